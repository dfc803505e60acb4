"""How the losses of a step's tokens become one number: the weight of a token in each micro-batch."""

from training.config import Reduction


def token_weights(target_counts: list[int], reduction: Reduction) -> list[float]:
    """Give, for each micro-batch, the weight of each of its target tokens, so that the loss is a sum.

    `target_counts` are the target tokens of all micro-batches of a step. `global_token` is the mean
    over all of them; `micro_batch_mean` the mean of the micro-batches' means, as InternLM averages. A
    micro-batch without targets weighs nothing, where a mean of its own would be 0 / 0.
    """
    match reduction:
        case Reduction.global_token:
            total = sum(target_counts)
            return [1 / total if total else 0.0] * len(target_counts)
        case Reduction.micro_batch_mean:
            rows = len(target_counts)
            return [1 / (rows * count) if count else 0.0 for count in target_counts]
