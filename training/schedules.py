"""Learning rate and beta2 as closed-form functions of the number of updates so far."""

import math

from training.config import OptimizerConfig, SchedulerConfig, ScheduleType


def learning_rate(update: int, *, steps: int, lr: float, config: SchedulerConfig) -> float:
    """Return the learning rate of an update, counted from 0, in a run of `steps`.

    Zero for `init_steps`, a linear warm-up that reaches `lr` at its last update, then the schedule; constant at
    `lr * min_lr_ratio` past the end (InternLM v0.2.1 `FineTuneCosineAnnealingWarmupLR`).
    """
    warmup_steps = int(steps * config.warmup_ratio)
    start = config.init_steps + warmup_steps
    if update < config.init_steps:
        return 0.0
    if update < start:
        return lr * (update + 1 - config.init_steps) / warmup_steps
    lowest = lr * config.min_lr_ratio
    match config.type:
        case ScheduleType.constant:
            return lr
        case ScheduleType.cosine:
            progress = min(1.0, (update - start) / max(1, steps - start))
            return lowest + (lr - lowest) * (1 + math.cos(math.pi * progress)) / 2
        case ScheduleType.wsd:
            # Linear decay to the end (Hu et al. 2024, arXiv:2404.06395, sec. 4)
            decay_steps = max(1, round(steps * config.decay_ratio))
            progress = min(1.0, max(0.0, (update - (steps - decay_steps)) / decay_steps))
            return lr - (lr - lowest) * progress


def second_beta(update: int, config: OptimizerConfig) -> float:
    """Return beta2 of an update, counted from 0: `max(beta2, 1 - update**-c)`, constant for c = 0.

    Shazeer & Stern 2018, arXiv:1804.04235, sec. 6; InternLM's `Beta2Scheduler`.
    """
    if config.beta2_c <= 0 or update < 1:
        return config.beta2
    return max(config.beta2, 1 - update**-config.beta2_c)
