"""How the losses of a step's tokens are averaged."""

from training.config import Reduction


def token_weights(target_counts: list[int], reduction: Reduction) -> list[float]:
    """Return the weight of a target token in each micro-batch of a step, so that the step's loss is a weighted sum.

    `target_counts` are the target tokens of all micro-batches. `global_token` is the mean over all of them,
    `micro_batch_mean` the mean of the micro-batches' means, as in InternLM. A micro-batch without targets has weight 0.
    """
    if reduction is Reduction.global_token:
        total = sum(target_counts)
        return [1 / total if total else 0.0] * len(target_counts)
    return [1 / (len(target_counts) * count) if count else 0.0 for count in target_counts]
