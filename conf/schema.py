"""The shape of every command's configuration, and the rules that join its sections.

The dataclasses beside the code are the truth; YAML groups only choose values. Imports no torch.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from corpus.config import MOST_SHARDS, Source, TokenizerConfig
from data.config import TOKENIZER_FILES, DataConfig, RampConfig, packs_of_step
from dry_run.config import DryRunConfig
from launch.config import LauncherConfig, Where
from launch.ranks import check_joined, joined_environment, nproc_per_node
from model.config import ModelConfig
from parallel.axes import layout_problems
from parallel.config import ParallelConfig, ParallelError
from tracking.config import EarlyStopConfig, LoggerConfig
from tracking.run_folder import checkpoints_of
from training.config import (
    CheckpointConfig,
    Dtype,
    Fp8,
    LossConfig,
    OptimizerConfig,
    OptimizerImpl,
    PrecisionConfig,
    SchedulerConfig,
)

CONTENT = ("model", "optimizer", "scheduler", "sampler", "all")
NAME = re.compile(r"[A-Za-z0-9._=,+-]+(/[A-Za-z0-9._=,+-]+)*")


class ConfigError(Exception):
    """Everything that is wrong with a configuration, one sentence a line."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    name: str = MISSING  # of the run; its folder is runs/<name>
    seed: int = 0  # of the weights
    steps: int = MISSING
    global_batch_tokens: int = MISSING  # tokens of a step over all devices
    ramp: RampConfig = MISSING
    skip_batches: list[str] = field(default_factory=list)  # the log's steps that are not trained on: [17,100-120]
    valid_every: int = 0  # steps between validations; 0: only at the end
    valid_tokens: int | None = None  # of a validation (null: the whole split)
    profile: bool = False  # measure a few steps instead of training: runs/<name>/profile
    init_from: str | None = None  # a run folder, a checkpoint, or a Hugging Face Llama/InternLM folder
    init_content: list[str] = field(default_factory=lambda: ["model"])
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    parallel: ParallelConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    scheduler: SchedulerConfig = MISSING
    precision: PrecisionConfig = MISSING
    loss: LossConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    early_stop: EarlyStopConfig = MISSING
    logger: LoggerConfig = MISSING
    launcher: LauncherConfig = MISSING
    dry_run: DryRunConfig = MISSING

    @property
    def micro_batch_tokens(self) -> int:
        return self.data.micro_batch_size * self.data.seq_len

    def grad_accum_steps(self, dp_size: int = 1) -> int:
        """Micro-batches a data-parallel rank runs in a full step."""
        return self.global_batch_tokens // (self.micro_batch_tokens * dp_size)

    def packs_of_step(self, step: int) -> int:
        """Packs in the batch of `step` (the first is 0), the ramp-up included."""
        return packs_of_step(
            step, global_batch_tokens=self.global_batch_tokens, ramp=self.ramp, pack_tokens=self.data.pack_tokens
        )

    def problems(self) -> Iterator[str]:
        if not NAME.fullmatch(self.name) or ".." in self.name:
            yield (
                f"name ({self.name}) must be letters, digits and ._=,+- (and / between folders), "
                "because it names runs/<name>"
            )
        if self.steps < 1:
            yield f"steps ({self.steps}) must be at least 1"
        for key in ("valid_every", "seed"):
            if getattr(self, key) < 0:
                yield f"{key} ({getattr(self, key)}) must be 0 or more"
        if self.valid_tokens is not None and self.valid_tokens < 1:
            yield f"valid_tokens ({self.valid_tokens}) must be at least 1, or null for the whole split"
        sections = (self.model, self.data, self.parallel, self.optimizer, self.scheduler)
        for section in (
            *sections,
            self.precision,
            self.loss,
            self.checkpoint,
            self.early_stop,
            self.logger,
            self.launcher,
            self.dry_run,
        ):
            yield from section.problems()
        wrong_batch = list(self._batch_problems())
        yield from wrong_batch
        yield from self._pair_problems()
        if not any(True for part in (self.model, self.data, self.parallel) for _ in part.problems()):
            yield from self._layout_problems([] if wrong_batch else self._batches())

    @property
    def world_size(self) -> int:
        """Processes of this run: those a dry run pretends, those that were started, or those that will be."""
        if self.dry_run.enabled:
            return self.dry_run.world_size
        joined = joined_environment(os.environ)
        if joined:
            check_joined(joined, self.parallel)
        if joined or self.launcher.where is Where.local:
            return int(joined.get("WORLD_SIZE", "1")) if joined else nproc_per_node(self.parallel, self.launcher)
        return self.launcher.nodes * self.launcher.ranks_per_node

    def _batches(self) -> list[int]:
        """Give the micro-batches of a step over all ranks, one number for each size a step may have."""
        if self.dry_run.enabled:
            return []  # it says itself what a batch should be
        full, start = self.global_batch_tokens, self.ramp.start_tokens
        tokens = {full} if start is None else {full, *range(start, full, self.ramp.increment_tokens)}
        return [size // self.micro_batch_tokens for size in sorted(tokens)]

    def _layout_problems(self, micro_batches: list[int]) -> Iterator[str]:
        try:
            world_size = self.world_size
        except (ParallelError, ValueError) as error:
            yield str(error)
            return
        yield from layout_problems(
            self.parallel,
            world_size,
            model=self.model,
            pack_len=self.data.pack_tokens,
            micro_batches=micro_batches,
        )

    def _batch_problems(self) -> Iterator[str]:
        unit = self.micro_batch_tokens
        if unit < 1 or self.global_batch_tokens < 1 or self.global_batch_tokens % unit:
            yield (
                f"global_batch_tokens ({self.global_batch_tokens}) must be a positive multiple of "
                f"data.micro_batch_size ({self.data.micro_batch_size}) x data.seq_len ({self.data.seq_len}) = {unit}"
            )
        ramp = self.ramp
        if ramp.start_tokens is not None:
            if ramp.every_steps < 1 or ramp.increment_tokens < 1:
                yield (
                    f"ramp.every_steps ({ramp.every_steps}) and ramp.increment_tokens ({ramp.increment_tokens}) "
                    "must be at least 1 when ramp.start_tokens is set"
                )
            for key in ("start_tokens", "increment_tokens"):
                value = getattr(ramp, key)
                if unit > 0 and (value < 1 or value % unit):
                    yield f"ramp.{key} ({value}) must be a positive multiple of a micro-batch ({unit} tokens)"
            if ramp.start_tokens > self.global_batch_tokens:
                yield (
                    f"ramp.start_tokens ({ramp.start_tokens}) must be at most "
                    f"global_batch_tokens ({self.global_batch_tokens})"
                )
        try:
            parse_ranges(self.skip_batches)
        except ValueError:
            yield f"skip_batches ({','.join(self.skip_batches)}) must look like [17,100-120]"

    def _pair_problems(self) -> Iterator[str]:
        if self.data.seq_len > self.model.max_seq_len:
            yield (
                f"data.seq_len ({self.data.seq_len}) must be at most model.max_seq_len "
                f"({self.model.max_seq_len}); shorten the one or raise the other"
            )
        if self.data.source is Source.random and self.data.vocab_size > self.model.vocab_size:
            yield (
                f"data.vocab_size ({self.data.vocab_size}) must be at most model.vocab_size ({self.model.vocab_size})"
            )
        if self.init_from == "":
            yield "init_from is not set; name a run, a checkpoint, or a Hugging Face folder to begin from"
        if self.init_from is None and self.init_content != ["model"]:
            yield f"init_content ({self.init_content}) needs init_from, the checkpoint to take it from"
        for word in self.init_content:
            if word not in CONTENT:
                yield f"init_content ({word}) must be among {', '.join(CONTENT)}"
        if self.precision.fp8 is Fp8.rowwise and self.parallel.tp != 1:
            yield (
                f"precision.fp8 (rowwise) needs whole matrices, parallel.tp 1, not {self.parallel.tp}; divide them by "
                "parallel.dp_shard, or use precision.fp8=tensorwise"
            )
        if self.parallel.cuda_graphs and self.precision.compute is Dtype.fp16:
            yield (
                "parallel.cuda_graphs (true) needs precision.compute bf16 or fp32, not fp16, whose loss scale the host "
                "sets; choose parallel.cuda_graphs=false"
            )
        if self.parallel.cuda_graphs and self.optimizer.impl in (OptimizerImpl.torch, OptimizerImpl.apex):
            yield (
                f"parallel.cuda_graphs (true) needs optimizer.impl auto or triton, not {self.optimizer.impl.value}, "
                "which takes its rates from the host; choose parallel.cuda_graphs=false"
            )
        attention = self.model.attention.value
        if attention in ("flash_attn", "flash_attn_4", "cudnn") and self.precision.compute is Dtype.fp32:
            yield (
                f"model.attention ({attention}) needs precision.compute bf16 or fp16, not "
                f"{self.precision.compute.value}; model.attention=sdpa computes in fp32"
            )


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    workers: int | None = None  # processes (null: all of this process's cores)
    shards: int = 1  # jobs that the work is divided into
    shard: int = 0  # the one that this process is
    add: bool = False  # add to a prepared corpus the files that came since
    launcher: LauncherConfig = MISSING

    def problems(self) -> Iterator[str]:
        yield from self.data.source_problems()
        yield from self.data.problems()
        yield from self.tokenizer.problems()
        yield from self.launcher.problems()
        if self.data.source is Source.random:
            yield "data.source (random) has nothing to prepare; train.py makes its tokens"
        if self.data.source is Source.tokens:
            yield "data.source (tokens) has nothing to prepare; train.py reads data.input as it is"
        if not 1 <= self.shards <= MOST_SHARDS or not 0 <= self.shard < self.shards:
            yield f"shard ({self.shard}) must be in [0, shards), and shards ({self.shards}) in [1, {MOST_SHARDS}]"
        if self.shards > 1 and self.data.max_documents is not None:
            yield f"data.max_documents ({self.data.max_documents}) counts in order, so it needs shards=1"
        if self.workers is not None and self.workers < 1:
            yield f"workers ({self.workers}) must be at least 1, or null for all cores"


def _origin_problems(key: str, run: str | None, hf: str | None) -> Iterator[str]:
    """Tell before torch is imported if there is no model where one is to be read from."""
    if run is not None and not checkpoints_of(Path(run)):
        yield f"run ({run}) holds no checkpoint; name a run folder such as runs/demo, or one of its checkpoints"
    if hf is not None and not (Path(hf) / "config.json").is_file():
        yield f"{key} ({hf}) holds no config.json; name a Hugging Face folder such as runs/demo/hf"


def _tokenizer_problems(run: str | None, hf: str | None) -> Iterator[str]:
    """Tell before torch is imported if a model that is there has no text to read or write."""
    if run is not None:
        folders = [checkpoint.parent.parent / "tokenizer" for checkpoint in checkpoints_of(Path(run))[:1]]
    else:
        folders = [Path(hf)] if hf is not None and (Path(hf) / "config.json").is_file() else []
    for folder in folders:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            yield (
                f"{folder} holds no tokenizer, without which there is no text; put the {' or '.join(TOKENIZER_FILES)} "
                "there that the model's tokens were made with"
            )


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    run: str | None = None  # a run folder or one of its checkpoints
    from_hf: str | None = None  # a Hugging Face folder to bring in
    out: str | None = None  # the folder to write (null: <run>/hf, or runs/<name of the folder>)
    dtype: Dtype = Dtype.bf16

    def problems(self) -> Iterator[str]:
        if (self.run is None) == (self.from_hf is None):
            yield "run and from_hf: set one of them, run=runs/<name> to export or from_hf=<folder> to bring in"
        yield from _origin_problems("from_hf", self.run, self.from_hf)


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    run: str | None = None  # a run folder or one of its checkpoints
    hf: str | None = None  # an exported or other Hugging Face folder
    prompt: str | None = None
    prompts: str | None = None  # a file with one prompt a line
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)  # strings that end a text, beside the tokens that do
    seed: int = 0
    samples: int = 1  # texts a prompt
    batch_size: int = 16  # prompts decoded together
    device: str = "auto"  # auto, cpu or cuda
    dtype: Dtype = Dtype.fp32
    cache: bool = True  # keep keys and values; false recomputes the whole text for every token

    def problems(self) -> Iterator[str]:
        if (self.run is None) == (self.hf is None):
            yield "run and hf: set one of them, run=runs/<name> or hf=<folder>"
        yield from _origin_problems("hf", self.run, self.hf)
        yield from _tokenizer_problems(self.run, self.hf)
        if (self.prompt is None) == (self.prompts is None):
            yield 'prompt and prompts: set one of them, prompt="..." or prompts=<file with one a line>'
        for key in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, key) < 1:
                yield f"{key} ({getattr(self, key)}) must be at least 1"
        if self.temperature < 0:
            yield f"temperature ({self.temperature}) must be 0 (greedy) or more"
        if self.top_k < 0:
            yield f"top_k ({self.top_k}) must be 0 (all) or more"
        if not 0 < self.top_p <= 1:
            yield f"top_p ({self.top_p}) must be in (0, 1]"
        if self.repetition_penalty <= 0:
            yield f"repetition_penalty ({self.repetition_penalty}) must be positive"
        if self.device not in ("auto", "cpu", "cuda"):
            yield f"device ({self.device}) must be auto, cpu or cuda"


SCHEMAS = {
    "train": TrainConfig,
    "prepare_data": PrepareConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
}


def register() -> None:
    """Give Hydra the schemas, under the names the primary configs start from."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(f"{name}_schema", node=schema)


def parse_ranges(parts: list[str]) -> list[range]:
    """Read ["17", "100-120"] as ranges of steps from 1 on, ends included; raises ValueError."""
    ranges = []
    for part in parts:
        first, _, last = part.partition("-")
        ranges.append(range(int(first), int(last or first) + 1))
        if not ranges[-1] or ranges[-1][0] < 1:
            raise ValueError(part)
    return ranges


def to_config(cfg: DictConfig) -> Any:
    """Turn a composed config into its checked dataclass, or say everything that is wrong with it."""
    problems = list(_unknown_keys(cfg))
    problems += [f"{key} is not set" for key in sorted(OmegaConf.missing_keys(cfg))]
    if not problems:
        try:
            config: Any = OmegaConf.to_object(cfg)
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from None
        problems = list(config.problems())
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def plain(value: Any) -> Any:
    """Give a value as JSON has it: enums by their value, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.value if isinstance(value, Enum) else value


def stored_model(run_config: dict[str, Any]) -> ModelConfig:
    """Give the model of a configuration that was stored as JSON with a checkpoint."""
    stored = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), run_config["model"]))
    assert isinstance(stored, ModelConfig)
    return stored


def did_you_mean(word: str, choices: list[str]) -> str:
    """Say the nearest choice, or all of them."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices)}"


def _unknown_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that `+key=value` added to a structured node; OmegaConf itself accepts them."""
    schema = OmegaConf.get_type(cfg)
    known = [f.name for f in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else None
    for key in cfg:
        if known is not None and key not in known:
            yield f"{prefix}{key} is not a setting; {did_you_mean(str(key), known)}"
        elif isinstance(cfg._get_node(key), DictConfig) and not OmegaConf.is_missing(cfg, key):
            yield from _unknown_keys(cfg[key], f"{prefix}{key}.")
