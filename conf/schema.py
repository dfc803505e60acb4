"""The typed configuration of every command, and rules between its sections. Torch-free."""

import dataclasses
import difflib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.ladder import ladder
from corpus.config import MOST_SHARDS, Source, Style, TokenizerConfig
from data.config import TRAINING_ONLY, DataConfig, RampConfig, fitting_vocab_size, packs_of_step, parse_ranges
from dry_run.config import DryRunConfig
from launch.config import LauncherConfig, UserError, unless
from model.config import ModelConfig, Parametrization
from parallel.config import Device, ParallelConfig
from tracking.config import AlertsConfig, EarlyStopConfig, LoggerConfig
from training import config as training
from training.config import Dtype

ALIASES = {"batch_size": "global_batch_tokens", "learning_rate": "lr"}  # names in other frameworks
VALID = ("loss", "perplexity", "accuracy", "bits_per_byte")  # metrics of a validation
CONTENT = ("model", "optimizer", "scheduler", "sampler", "all")
NAME = re.compile(r"[\w.=,+-]{1,200}(/[\w.=,+-]{1,200})*")
# Metadata of fields; a field of type Any that is not text has {"number": True}
PROSE = {"prose": True}  # never a path
FREE = {"free": True}  # may change on resume


class ConfigError(UserError):
    """All errors in a configuration, one per line."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    name: str = field(default=MISSING, metadata=FREE)  # of the run; its folder is runs/<name>
    seed: int = 0  # of the weights
    steps: int = MISSING
    global_batch_tokens: int = MISSING  # tokens per step over all devices
    ramp: RampConfig = MISSING
    skip_batches: list[str] = field(default_factory=list)  # steps whose batches are skipped: [17,100-120]
    valid_every: int = field(default=0, metadata=FREE)  # steps between validations; 0: only at the end
    valid_tokens: int | None = field(default=None, metadata=FREE)  # per validation (null: the whole split)
    profile: bool = False  # profile a few steps instead of training: runs/<name>/profile
    init_from: str | None = field(default=None, metadata=FREE)  # a run, a checkpoint, or a Hugging Face folder
    init_content: list[str] = field(default_factory=lambda: ["model"], metadata=FREE)
    objective: str = field(default="valid/loss", metadata=FREE)  # metric that searches minimise; -metric: maximise
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    parallel: ParallelConfig = field(default=MISSING, metadata=FREE)
    optimizer: training.OptimizerConfig = MISSING
    scheduler: training.SchedulerConfig = MISSING
    precision: training.PrecisionConfig = MISSING
    loss: training.LossConfig = MISSING
    checkpoint: training.CheckpointConfig = field(default=MISSING, metadata=FREE)
    early_stop: EarlyStopConfig = field(default=MISSING, metadata=FREE)
    evaluate: training.EvaluationConfig = field(default=MISSING, metadata=FREE)
    samples: training.SamplesConfig = field(default=MISSING, metadata=FREE)
    logger: LoggerConfig = field(default=MISSING, metadata=FREE)
    alerts: AlertsConfig = field(default=MISSING, metadata=FREE)
    launcher: LauncherConfig = field(default=MISSING, metadata=FREE)
    dry_run: DryRunConfig = field(default=MISSING, metadata=FREE)

    @property
    def micro_batch_tokens(self) -> int:
        return self.data.micro_batch_size * self.data.seq_len

    def grad_accum_steps(self, dp_size: int = 1) -> int:
        """Micro-batches per data-parallel rank and full step."""
        return self.global_batch_tokens // (self.micro_batch_tokens * dp_size)

    def packs_of_step(self, step: int) -> int:
        """Packs in the batch of `step`, counted from 0, with the ramp-up."""
        tokens, pack_tokens = self.global_batch_tokens, self.data.pack_tokens
        return packs_of_step(step, global_batch_tokens=tokens, ramp=self.ramp, pack_tokens=pack_tokens)

    def micro_batches(self) -> list[int]:
        """Return the micro-batches per step over all ranks, for every batch size of the ramp-up."""
        full, start = self.global_batch_tokens, self.ramp.start_tokens
        tokens = {full} if start is None else {full, *range(start, full, self.ramp.increment_tokens)}
        return [size // self.micro_batch_tokens for size in sorted(tokens)]

    def problems(self) -> Iterator[str]:
        if not NAME.fullmatch(self.name) or ".." in self.name:
            yield f"name ({self.name}) names runs/<name>; use letters, digits, ._=,+- and /, 200 per folder at most"
        yield from _below(self, 1, "steps", "valid_tokens")
        yield from _below(self, 0, "valid_every", "seed")
        for section in (getattr(self, f.name) for f in dataclasses.fields(self)):
            if hasattr(section, "problems"):
                yield from section.problems()
        yield from self.batch_problems()
        try:
            parse_ranges(self.skip_batches)
        except ValueError:
            yield f"skip_batches ({','.join(self.skip_batches)}) must look like [17,100-120]"
        if self.init_from == "":
            yield "init_from is not set; name a run, a checkpoint, or a Hugging Face folder"
        if self.init_from is None and self.init_content != ["model"]:
            yield f"init_content ({self.init_content}) needs init_from"
        if unknown := [word for word in self.init_content if word not in CONTENT]:
            yield f"init_content ({', '.join(unknown)}) must be among {', '.join(CONTENT)}"
        yield from self._pair_problems()

    def batch_problems(self) -> Iterator[str]:
        unit, ramp = self.micro_batch_tokens, self.ramp
        if unit < 1 or self.global_batch_tokens < 1 or self.global_batch_tokens % unit:
            factors = f"data.micro_batch_size ({self.data.micro_batch_size}) x data.seq_len ({self.data.seq_len})"
            yield f"global_batch_tokens ({self.global_batch_tokens}) must be a positive multiple of {factors} = {unit}"
        if ramp.start_tokens is None or unit < 1:
            return
        yield from unless(ramp, "ramp", "at least 1", lambda x: x >= 1, "every_steps")
        for key in ("start_tokens", "increment_tokens"):
            if (value := getattr(ramp, key)) < 1 or value % unit:
                yield f"ramp.{key} ({value}) must be a positive multiple of a micro-batch ({unit} tokens)"
        if ramp.start_tokens > self.global_batch_tokens:
            yield f"ramp.start_tokens ({ramp.start_tokens}) must be at most global_batch_tokens"

    def _pair_problems(self) -> Iterator[str]:
        model, data, precision, graphs = self.model, self.data, self.precision, self.parallel.cuda_graphs
        if data.seq_len > model.max_seq_len:
            yield f"data.seq_len ({data.seq_len}) must be at most model.max_seq_len ({model.max_seq_len})"
        if precision.fp8 is training.Fp8.rowwise and self.parallel.tp != 1:
            yield f"precision.fp8 (rowwise) needs parallel.tp 1, not {self.parallel.tp}; use precision.fp8=tensorwise"
        if precision.fp8 is not training.Fp8.none and self.parallel.async_tp:
            yield f"parallel.async_tp (true) needs precision.fp8=none, not {precision.fp8.value}"
        by_size, scale = model.parametrization is not Parametrization.standard, self.optimizer.scale
        if by_size and self.optimizer.name == "muon" and scale is not training.MuonScale.spectral:
            of_model = f"model.parametrization ({model.parametrization.value})"
            yield f"optimizer.scale ({scale.value}) does not go with {of_model}; use optimizer.scale=spectral"
        no_tokenizer = data.source is Source.random or (data.source is Source.tokens and not data.tokenizer)
        if (self.evaluate.tasks or self.samples.prompts) and no_tokenizer:
            yield "evaluate.tasks and samples.prompts need a tokenizer; set data.tokenizer"
        if self.samples.prompts and self.samples.max_new_tokens >= data.pack_tokens:
            yield f"samples.max_new_tokens ({self.samples.max_new_tokens}) must be below {data.pack_tokens}, a pack"
        if self.checkpoint.keep_best and (self.valid_every < 1 or self.checkpoint.every % self.valid_every):
            least = f"a checkpoint.every ({self.checkpoint.every}) that is a multiple of it"
            yield f"checkpoint.keep_best (true) needs valid_every ({self.valid_every}), and {least}"
        for key, metric in (("objective", self.objective), ("early_stop.metric", self.early_stop.metric)):
            kind, _, name = metric.removeprefix("-").partition("/")
            known = {"evaluation": name in self.evaluate.metrics(), "valid": name.partition("/")[0] in VALID}
            if not name or not known.get(kind, kind in ("train", "perf")):
                yield f"{key} ({metric}) must be train/, perf/, valid/{'|'.join(VALID)}, or evaluation/TASK/SCORE"
        if (self.early_stop.margin or 0) > 0 and self.early_stop.after_step >= self.steps:
            yield f"early_stop.after_step ({self.early_stop.after_step}) must be below steps ({self.steps})"
        if self.profile and self.steps < (fewest := training.WARM_UP + 2 * training.PROFILED):
            yield f"profile (true) runs {fewest} steps; steps is {self.steps}"
        if graphs and precision.compute is Dtype.fp16:
            yield "parallel.cuda_graphs (true) needs precision.compute bf16 or fp32, not fp16"
        if graphs and self.optimizer.impl in (training.OptimizerImpl.torch, training.OptimizerImpl.apex):
            yield f"parallel.cuda_graphs (true) needs optimizer.impl auto or triton, not {self.optimizer.impl.value}"
        if model.attention.value in ("flash_attn", "flash_attn_4", "cudnn") and precision.compute is Dtype.fp32:
            yield f"model.attention ({model.attention.value}) needs precision.compute bf16 or fp16; use sdpa with fp32"


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    workers: int | None = None  # processes (null: all of this process's cores)
    shards: int = 1  # number of jobs
    shard: int = 0  # index of this job
    verify: bool = False  # check the hashes of all shards
    add: bool = False  # add new input files to a prepared corpus
    launcher: LauncherConfig = MISSING

    def problems(self) -> Iterator[str]:
        yield from self.data.source_problems()
        for section in (self.data, self.tokenizer, self.launcher):
            yield from section.problems()
        if self.tokenizer.special_tokens_in_text and self.data.style is not Style.text:
            yield f"tokenizer.special_tokens_in_text (true) needs data.style text, not {self.data.style.value}"
        if self.data.source in (Source.random, Source.tokens):
            yield f"data.source ({self.data.source.value}) has nothing to prepare; run train.py"
        if not 1 <= self.shards <= MOST_SHARDS or not 0 <= self.shard < self.shards:
            yield f"shard ({self.shard}) must be in [0, shards), and shards ({self.shards}) in [1, {MOST_SHARDS}]"
        if self.shards > 1 and self.data.max_documents is not None:
            yield f"data.max_documents ({self.data.max_documents}) counts in order, so it needs shards=1"
        yield from _below(self, 1, "workers")


@dataclass(kw_only=True, slots=True)
class SavedConfig:
    """A trained model."""

    run: str | None = None  # a run folder or one of its checkpoints
    step: int | None = None  # of the run's checkpoint (null: the newest)
    dtype: Dtype = Dtype.fp32

    def problems(self) -> Iterator[str]:
        if self.step is not None and self.run is None:
            yield f"step ({self.step}) needs run"


@dataclass(kw_only=True, slots=True)
class RunOrHfConfig(SavedConfig):
    hf: str | None = None  # an exported or other Hugging Face folder

    def problems(self) -> Iterator[str]:
        if (self.run is None) == (self.hf is None):
            yield "run and hf: set one of them, run=runs/<name> or hf=<folder>"
        yield from SavedConfig.problems(self)


@dataclass(kw_only=True, slots=True)
class ExportConfig(SavedConfig):
    from_hf: str | None = None  # a Hugging Face folder to import
    from_internlm: str | None = None  # a folder of InternLM's training checkpoints to import
    tokenizer: str | None = None  # from_internlm: a tokenizer's file or folder, because the checkpoints have none
    out: str | None = None  # the folder to write (null: <run>/hf, or runs/<name of the folder>)
    dtype: Dtype = Dtype.auto  # the run's precision.compute, and bf16 if that is auto

    def problems(self) -> Iterator[str]:
        if [self.run, self.from_hf, self.from_internlm].count(None) != 2:
            yield "run, from_hf and from_internlm: set one, run=runs/<name> to export or from_hf=<folder> to import"
        if self.tokenizer is not None and self.from_internlm is None:
            yield f"tokenizer ({self.tokenizer}) needs from_internlm"
        yield from SavedConfig.problems(self)


@dataclass(kw_only=True, slots=True)
class GenerateConfig(RunOrHfConfig):
    prompt: str | None = field(default=None, metadata=PROSE)  # "-": all of standard input
    prompts: str | None = None  # a file with one prompt per line, or "-"
    chat: bool = False  # prompts are user messages; without a prompt, an interactive conversation
    system: str | None = field(default=None, metadata=PROSE)  # chat: the system message
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list, metadata=PROSE)  # strings that end a text, besides stop tokens
    seed: int = 0
    samples: int = 1  # texts per prompt
    batch_size: int = 16  # prompts decoded together
    device: Device = Device.auto
    cache: bool = True  # use a KV cache

    def problems(self) -> Iterator[str]:
        yield from RunOrHfConfig.problems(self)
        if (self.prompt is None) == (self.prompts is None) and not (self.chat and self.prompt is None):
            yield 'prompt and prompts: set one of them, prompt="..." or prompts=<file>, or chat=true for a conversation'
        if self.system is not None and not self.chat:
            yield f"system ({self.system}) needs chat=true"
        if self.dtype is Dtype.auto:
            yield "dtype (auto) is not for generation; choose bf16, fp16 or fp32"
        yield from _below(self, 1, "max_new_tokens", "samples", "batch_size")
        yield from _below(self, 0, "top_k", "seed")
        # fp32 logits are not finite beyond these bounds.
        if not (self.temperature == 0 or 1e-4 <= self.temperature <= 1e4):
            yield f"temperature ({self.temperature}) must be 0 or in [0.0001, 10000]"
        if not 0 < self.top_p <= 1:
            yield f"top_p ({self.top_p}) must be in (0, 1]"
        if not 1e-4 <= self.repetition_penalty <= 1e4:
            yield f"repetition_penalty ({self.repetition_penalty}) must be in [0.0001, 10000]"
        if "" in self.stop:
            yield "stop has an empty string, which would end every text at once; remove it"


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(RunOrHfConfig):
    corpus: str | None = None  # folder of a prepared corpus (null: that of the run)
    seq_len: int | None = None  # of `corpus` (null: as the run was trained, or with hf the model's max_seq_len)
    valid_tokens: int | None = None  # of the corpus's validation split (null: all of it, 0: none)
    tasks: list[str] = field(default_factory=list)  # builtin, a fetched one such as hellaswag, or a .jsonl file
    harness: list[str] = field(default_factory=list)  # tasks of lm-evaluation-harness: names or .yaml files
    batch_tokens: int = 16384  # of tasks, per forward pass and device
    dtype: Dtype = Dtype.auto
    parallel: ParallelConfig = MISSING

    def problems(self) -> Iterator[str]:
        yield from RunOrHfConfig.problems(self)
        yield from (*_below(self, 1, "batch_tokens"), *_below(self, 2, "seq_len"), *_below(self, 0, "valid_tokens"))
        yield from self.parallel.problems()
        if self.harness and importlib.util.find_spec("lm_eval") is None:
            yield f"harness ({', '.join(self.harness)}) needs lm-evaluation-harness: pip install lm-eval"
        if not (self.tasks or self.harness or ((self.corpus or self.run) and self.valid_tokens != 0)):
            yield "nothing to evaluate; name tasks, such as tasks=[builtin], or a corpus: corpus=corpora/builtin"


def _below(section: object, least: int, *keys: str) -> Iterator[str]:
    """Yield an error for each value below `least` or beyond 64 bits; null is allowed."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and not least <= value < 2**63:
            yield f"{key} ({value}) must be {f'at least {least}' if value < least else 'below 2**63'}"


SAVED = {"export": ExportConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig}
SCHEMAS = {"train": TrainConfig, "prepare_data": PrepareConfig, **SAVED}


def register() -> None:
    """Register the schemas and resolvers that the YAML files use."""
    OmegaConf.register_new_resolver("ladder", ladder, replace=True)
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(f"{name}_schema", node=schema)


def to_config(cfg: DictConfig, more_problems: Callable[[Any], Iterable[str]] = lambda _: ()) -> Any:
    """Return a composed configuration as its dataclass; raise `ConfigError` with all errors."""
    if problems := [*unknown_keys(cfg), *(f"{key} is not set" for key in sorted(OmegaConf.missing_keys(cfg)))]:
        raise ConfigError("\n".join(problems))
    try:
        config: Any = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    size = str(config.model.vocab_size) if isinstance(config, TrainConfig) else ""
    if size == "auto":
        config.model.vocab_size = fitting_vocab_size(config.data)
    elif size.isdecimal():  # in quotes
        config.model.vocab_size = int(size)
    if problems := [*config.problems(), *more_problems(config)]:
        raise ConfigError("\n".join(problems))
    return config


def to_plain(config: Any) -> dict[str, Any]:
    """Return a typed configuration as JSON that OmegaConf can read back.

    Enums become their values, inf and nan strings, and a literal `${` is escaped.
    """
    text = json.dumps(dataclasses.asdict(config), default=lambda option: option.value)
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\\\${", text)  # in JSON a backslash is two
    return json.loads(escaped, parse_constant={"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}.__getitem__)


def _settings(section: type, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """Yield dotted key, section and field of every setting, including sections."""
    for found in dataclasses.fields(section):
        yield prefix + found.name, section, found
        if isinstance(found.type, type) and dataclasses.is_dataclass(found.type):
            yield from _settings(found.type, f"{prefix}{found.name}.")


@cache
def defaults() -> dict[str, Any]:
    """Return the defaults of all settings, as in `to_plain`, for stored configurations that lack a newer setting."""
    made = {
        key: found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
        for key, _, found in _settings(TrainConfig)
    }
    return {key: getattr(value, "value", value) for key, value in made.items() if value != MISSING}


def free_keys() -> list[str]:
    """Return the keys that may change on resume: `free` fields, and those of the corpus, whose tokens are compared."""
    return [
        key
        for key, section, found in _settings(TrainConfig)
        if found.metadata.get("free") is True or (section is DataConfig and found.name not in TRAINING_ONLY)
    ]


def similar_keys(key: str, section: type) -> list[str]:
    """Return the dotted keys that end with the same word, or the closest match."""
    keys, word = [key for key, _, _ in _settings(section)], key.rpartition(".")[2]
    named = [other for other in keys if other.rpartition(".")[2] == ALIASES.get(word, word)]
    return named or difflib.get_close_matches(key, keys, n=1)


def stored(section: type, values: dict[str, Any]) -> Any:
    """Return a section of a stored configuration as its dataclass, without settings that no longer exist."""
    known = {field.name for field in dataclasses.fields(section)}
    values = {key: value for key, value in values.items() if key in known}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), values))


def stored_model(run_config: dict[str, Any]) -> ModelConfig:
    return stored(ModelConfig, run_config["model"])


def unknown_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield an error for each key that `+key=value` added to a dataclass; OmegaConf accepts them."""
    schema = OmegaConf.get_type(cfg)
    known = [f.name for f in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else None
    for key in cfg:
        if known is not None and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"
            yield f"{prefix}{key} is not a setting; {hint}"
        elif OmegaConf.is_dict(cfg._get_node(key)) and not OmegaConf.is_missing(cfg, key):
            yield from unknown_keys(cfg[key], f"{prefix}{key}.")
