"""Dynamic loss scaling for fp16."""

from training.config import Dtype, PrecisionConfig


class LossScaler:
    """A loss scale that grows after `growth_interval` finite steps and falls after repeated overflows.

    As in InternLM's `DynamicGradScaler`, the first `hysteresis` overflows do not lower the scale, each further one
    does, and growth resets the count. The scale of bf16 and fp32 is 1.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.config = config
        self.dynamic = config.compute is Dtype.fp16
        self.scale = config.initial_scale if self.dynamic else 1.0
        self.finite_steps = self.overflows = 0

    def update(self, *, finite: bool) -> None:
        """Record whether a step's gradients were finite; only of a `dynamic` scale."""
        config = self.config
        if finite:
            self.finite_steps += 1
            if self.finite_steps == config.growth_interval:
                self.finite_steps = self.overflows = 0
                self.scale = min(self.scale * config.growth_factor, config.max_scale)
        else:
            self.finite_steps = 0
            self.overflows += 1
            if self.overflows > config.hysteresis:
                self.scale = max(self.scale * config.backoff_factor, config.min_scale)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "finite_steps": self.finite_steps, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = float(state["scale"])
        self.finite_steps, self.overflows = int(state["finite_steps"]), int(state["overflows"])
