"""Dynamic loss scale for fp16, whose gradients underflow without one."""

from training.config import Dtype, PrecisionConfig


class LossScaler:
    """A factor on the loss: grows after a run of finite steps, falls when overflows repeat.

    As InternLM's `DynamicGradScaler`: `hysteresis` overflows are forgiven, each further one lowers
    the scale, and a growth forgives again. For bf16 and fp32 the scale is 1 and stays so.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.config = config
        self.dynamic = config.compute is Dtype.fp16
        self.scale = config.initial_scale if self.dynamic else 1.0
        self.finite_steps = 0
        self.overflows = 0

    def update(self, *, finite: bool) -> None:
        """Take note of a step whose gradients were finite or not."""
        config = self.config
        if not self.dynamic:
            return
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
        self.finite_steps = int(state["finite_steps"])
        self.overflows = int(state["overflows"])
