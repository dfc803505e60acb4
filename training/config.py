"""Configuration of training: optimizer, schedule, precision, loss, checkpoints, evaluation. Imports no torch."""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from launch.config import UserError, unless

WARM_UP, PROFILED = 3, 2  # steps of profile=true: warm-up, then some without and with the profiler


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be used."""


class DamagedError(CheckpointError):
    """A damaged checkpoint: a wrong hash, size or format, or values that are not finite."""


class IncompleteError(DamagedError):
    """A checkpoint with missing files, such as an interrupted copy."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written."""


class TrainingError(UserError):
    """An error after which a run must not continue."""


class Decay(Enum):
    matrices = "matrices"  # weight decay on matrices only, not on norms and biases
    all = "all"  # on every parameter, as InternLM does


class ScheduleType(Enum):
    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class Dtype(Enum):
    auto = "auto"  # precision.compute only: bf16 if the device supports it natively, else fp32
    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


class Fp8(Enum):
    none = "none"
    tensorwise = "tensorwise"  # one scale per matrix: fastest
    rowwise = "rowwise"  # one scale per row: more accurate


class OptimizerImpl(Enum):
    auto = "auto"  # triton on a CUDA device, torch elsewhere
    triton = "triton"  # our kernel: a single pass without host synchronization
    torch = "torch"  # torch's fused AdamW on fp32 copies
    apex = "apex"  # NVIDIA apex's fused Adam on fp32 copies


class MuonScale(Enum):
    """Factor on the orthogonalized update of a matrix (out, in)."""

    match_rms_adamw = "match_rms_adamw"  # 0.2 sqrt(max(out, in)): matches AdamW's update RMS and learning rates
    spectral = "spectral"  # sqrt(out / in)
    original = "original"  # sqrt(max(1, out / in))


class Reduction(Enum):
    global_token = "global_token"  # mean over all target tokens of a step
    micro_batch_mean = "micro_batch_mean"  # mean of the means of micro-batches, as InternLM does


class Resume(Enum):
    auto = "auto"  # from the newest intact checkpoint of the run folder, if any
    never = "never"  # refuse a run folder with checkpoints
    must = "must"  # refuse a run folder without checkpoints


class OnSaveError(Enum):
    warn = "warn"  # retry at the next interval; a failure of the final save is still an error
    stop = "stop"


# Update rules by optimizer.name; any other class is named as module:Class.
OPTIMIZERS = {"adamw": "training.optim.adamw:AdamW", "muon": "training.optim.muon:Muon"}


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    name: str = "adamw"  # or muon, or module:Class
    options: dict[str, Any] = field(default_factory=dict, metadata={"number": True})  # for rules named by module:Class
    lr: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    beta2_c: float = 0.0  # beta2 = max(beta2, 1 - i**-c) at update i; 0: constant
    eps: float = 1e-8
    decay: Decay = Decay.matrices
    state_dtype: Dtype = Dtype.fp32  # of the moments: fp32 or bf16
    impl: OptimizerImpl = OptimizerImpl.auto  # of adamw
    momentum: float = 0.95  # of muon, like the following four
    scale: MuonScale = MuonScale.match_rms_adamw
    polar_express: bool = False  # Polar Express coefficients of the five iterations (arXiv:2505.16932)
    normuon: bool = False  # normalize rows by a running root mean square with beta2 (arXiv:2510.05491)
    cautious_decay: bool = False  # decay only weights that the update shrinks (arXiv:2510.12402)
    embed_lr_scale: float = 1.0  # factor on the learning rate of the embedding
    head_lr_scale: float = 1.0
    vector_lr_scale: float = 1.0  # of norms and biases
    max_grad_norm: float = 1.0  # global norm; 0: no clipping
    max_nonfinite_steps: int = 10  # consecutive steps without a finite gradient before the run is stopped
    # report a loss or gradient norm so many standard deviations above recent logged steps; 0: never
    spike_sigma: float = field(default=0.0, metadata={"free": True})
    skip_spikes: bool = False  # do not update on such a step

    def problems(self) -> Iterator[str]:
        for key in ("momentum", "scale", "polar_express", "normuon", "cautious_decay") if self.name == "adamw" else ():
            if getattr(self, key) != OptimizerConfig.__dataclass_fields__[key].default:
                yield f"optimizer.{key} is a setting of optimizer=muon, not of adamw"
        if ":" not in self.name and self.name not in OPTIMIZERS:
            yield f"optimizer.name ({self.name}) must be {', '.join(OPTIMIZERS)} or module:Class"
        yield from unless(self, "optimizer", "positive and finite", lambda x: 0 < x < math.inf, "lr", "eps")
        keys = ("weight_decay", "beta2_c", "max_grad_norm", "spike_sigma")
        scales = ("embed_lr_scale", "head_lr_scale", "vector_lr_scale")
        yield from unless(self, "optimizer", "0 or more", lambda x: x >= 0, *keys, *scales)
        if self.skip_spikes and not self.spike_sigma:
            yield "optimizer.skip_spikes (true) needs optimizer.spike_sigma, such as 6"
        yield from unless(self, "optimizer", "in [0, 1)", lambda x: 0 <= x < 1, "beta1", "beta2", "momentum")
        yield from unless(self, "optimizer", "at least 1", lambda x: x >= 1, "max_nonfinite_steps")
        if self.state_dtype not in (Dtype.fp32, Dtype.bf16):
            yield f"optimizer.state_dtype ({self.state_dtype.value}) must be fp32 or bf16"


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """The learning rate as a factor on optimizer.lr."""

    type: ScheduleType = ScheduleType.cosine
    warmup_ratio: float = 0.01  # of the run's steps
    init_steps: int = 0  # steps at learning rate 0 before the warm-up
    min_lr_ratio: float = 0.1  # final over peak learning rate
    decay_ratio: float = 0.2  # wsd: fraction of the steps that decay

    def problems(self) -> Iterator[str]:
        keys = ("warmup_ratio", "min_lr_ratio", "decay_ratio")
        yield from unless(self, "scheduler", "in [0, 1]", lambda x: 0 <= x <= 1, *keys)
        if self.type is ScheduleType.wsd and self.warmup_ratio + self.decay_ratio > 1:
            yield f"scheduler.warmup_ratio ({self.warmup_ratio}) + decay_ratio ({self.decay_ratio}) must be at most 1"


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Dtypes, and the dynamic loss scale of fp16 (defaults: InternLM's 7B tutorial).

    The optimizer's master weights are always fp32.
    """

    compute: Dtype = Dtype.auto  # of weights and activations
    fp8: Fp8 = Fp8.none  # matrix products of the blocks in fp8, with dynamic scales (arXiv:2209.05433)
    grad_dtype: Dtype | None = None  # of gradient accumulation (null: compute; fp32 for hundreds of micro-batches)
    initial_scale: float = 2.0**16
    growth_interval: int = 1000  # finite steps before the scale grows
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    hysteresis: int = 2  # overflows before the scale falls

    def problems(self) -> Iterator[str]:
        if self.fp8 is not Fp8.none and self.compute not in (Dtype.auto, Dtype.bf16):
            yield f"precision.fp8 ({self.fp8.value}) needs precision.compute bf16, not {self.compute.value}"
        if self.fp8 is Fp8.rowwise and importlib.util.find_spec("torchao") is None:
            yield "precision.fp8 (rowwise) needs torchao: pip install -r requirements-gpu.txt, or use tensorwise"
        if self.grad_dtype not in (None, Dtype.fp32) and self.grad_dtype is not self.compute:
            yield f"precision.grad_dtype ({self.grad_dtype.value}) must be fp32, {self.compute.value} or null"


@dataclass(kw_only=True, slots=True)
class LossConfig:
    reduction: Reduction = Reduction.global_token
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # factor on the squared log-sum-exp of the logits (PaLM: 1e-4)
    chunk_tokens: int = 4096  # tokens per chunk of logits

    def problems(self) -> Iterator[str]:
        yield from unless(self, "loss", "in [0, 1)", lambda x: 0 <= x < 1, "label_smoothing")
        yield from unless(self, "loss", "at least 1", lambda x: x >= 1, "chunk_tokens")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 1000  # steps; 0: only at the end
    keep: int = 3  # newest checkpoints to keep; 0: all
    keep_every: int = 0  # steps; also keep checkpoints at multiples of it (0: none)
    keep_best: bool = False  # also keep the checkpoint with the lowest validation loss
    resume: Resume = Resume.auto
    asynchronous: bool | None = None  # write in the background, from a copy in host memory (null: on GPUs)
    on_save_error: OnSaveError = OnSaveError.warn
    path: str | None = None  # remote copy of every checkpoint, such as s3://bucket/prefix, also used for resume
    check_replicas_every: int = 0  # steps between comparisons of replicas, besides that of every save; 0: never
    stop_file: str | None = None  # a file with N: save and stop at step N; -N: save at step N and continue
    accept_changes: list[str] = field(default_factory=list)  # keys that may differ from the stored config

    def problems(self) -> Iterator[str]:
        keys = ("every", "keep", "keep_every", "check_replicas_every")
        yield from unless(self, "checkpoint", "0 or more", lambda x: x >= 0, *keys)
        if self.keep_every and (self.every < 1 or self.keep_every % self.every):
            yield f"checkpoint.keep_every ({self.keep_every}) must be a multiple of checkpoint.every ({self.every})"


SCORES = ("acc", "acc_norm", "bpb")  # of a task; see training.tasks


def is_task_file(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz"))


def task_name(name: str) -> str:
    """Return a task's name in metrics."""
    return Path(name).name.removesuffix(".gz").removesuffix(".jsonl") if is_task_file(name) else name


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation tasks during training; see training.tasks."""

    every: int = 0  # steps; 0: only at the end
    tasks: list[str] = field(default_factory=list)
    max_share: float | None = None  # limit on the fraction of time for tasks and samples; the last step has no limit

    def problems(self) -> Iterator[str]:
        yield from unless(self, "evaluate", "in (0, 1], or null", lambda x: 0 < x <= 1, "max_share")
        if self.every and not self.tasks:
            yield f"evaluate.every ({self.every}) needs evaluate.tasks"

    def metrics(self) -> set[str]:
        return {f"{task_name(task)}/{score}" for task in self.tasks for score in SCORES}


@dataclass(kw_only=True, slots=True)
class SamplesConfig:
    """Texts that the model generates during training, with fixed random seeds."""

    every: int = 0  # steps; 0: only at the end
    prompts: list[str] = field(default_factory=list, metadata={"prose": True})
    max_new_tokens: int = 64  # one forward pass per token
    temperature: float = 0.8  # 0: greedy

    def problems(self) -> Iterator[str]:
        if self.every and not self.prompts:
            yield f"samples.every ({self.every}) needs samples.prompts"
        yield from unless(self, "samples", "at least 0", lambda x: x >= 0, "temperature")
