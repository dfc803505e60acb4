"""Checks before a GPU, a process group or Slurm is used. Imports no torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

from conf.schema import EvaluateConfig, GenerateConfig, PrepareConfig, SavedConfig, TrainConfig, to_plain
from corpus.config import DataError, Source
from corpus.inputs import list_items
from data.config import check_tokenizer
from data.manifest import check_exists, check_fits
from data.mixed_text import mixed_lines
from data.tokenizer import Tokenizer, load_tokenizer
from launch.config import UserError, Where
from launch.environment import joined_environment, visible_gpus, world_size
from model.config import ModelError
from parallel.axes import layout_problems
from parallel.config import Device, ParallelError
from tracking.run_folder import check_not_held, check_origin, check_stored_config, committed, run_dir_of
from tracking.store import Store, is_address
from training.config import CheckpointError, Fp8
from training.tasks import read_tasks

BASES = {  # of the classes that a setting names as module:Class
    "model.mlp": "torch.nn:Module",
    "model.attention_layer": "torch.nn:Module",
    "optimizer.name": "training.optim.optimizer:UpdateRule",
    "logger.extra": "builtins:object",
}


def preflight_problems(config: TrainConfig | PrepareConfig | SavedConfig) -> Iterator[str]:
    """Yield problems that depend on more than the configuration, such as the number of ranks or missing files."""
    try:
        if isinstance(config, TrainConfig):
            yield from _layout_problems(config)
            yield from _class_problems(config)
            if config.checkpoint.path is not None:
                Store(config.checkpoint.path)
            if not (config.dry_run.enabled or any(config.model.problems())):
                check_fits(config.data, config.model.vocab_size)
        elif isinstance(config, SavedConfig):
            _check_model(config)
    except UserError as error:
        yield str(error)


def _check_model(config: SavedConfig) -> None:
    """Raise a user error if the model, a tokenizer that is needed, or a task does not exist."""
    hf: str | None = getattr(config, "hf", None) or getattr(config, "from_hf", None)
    internlm: str | None = getattr(config, "from_internlm", None)
    if internlm is not None and not (Path(internlm) / "model_config.pt").is_file():
        raise ModelError(f"{internlm} has no model_config.pt; name a folder of InternLM's training checkpoints")
    if (config.run is None) == (hf is None) or is_address(config.run):
        return  # reported by the configuration, or InternLM's; remote runs are checked when downloaded
    if hf is not None and not (Path(hf) / "config.json").is_file():
        raise ModelError(f"{hf} has no config.json; name a Hugging Face folder such as runs/demo/hf")
    tokenizer = Path(hf) if hf is not None else run_dir_of(Path(config.run or ""), config.step) / "tokenizer"
    tasks, harness = (config.tasks, config.harness) if isinstance(config, EvaluateConfig) else ([], [])
    if isinstance(config, GenerateConfig) or tasks or harness:
        check_tokenizer(tokenizer.absolute())
    read_tasks(tasks)
    for name in harness:
        if name.endswith(".yaml") and not Path(name).is_file():
            raise ModelError(f"harness ({name}) does not exist; name a task's .yaml file, or a task by its name")


def _layout_problems(config: TrainConfig) -> Iterator[str]:
    if any(any(section.problems()) for section in (config.model, config.data, config.parallel)):
        return
    # A dry run proposes a batch size.
    steps = [] if config.dry_run.enabled or any(config.batch_problems()) else config.micro_batches()
    yield from layout_problems(
        config.parallel, world_size(config), model=config.model, pack_len=config.data.pack_tokens, micro_batches=steps
    )


def _class_problems(config: TrainConfig) -> Iterator[str]:
    """Yield a problem for each `module:Class` that cannot be imported or has another base.

    Without one, imports no torch. What a job's setup brings is checked there.
    """
    model, optimizer, launcher = config.model, config.optimizer, config.launcher
    if launcher.where is Where.slurm and launcher.setup:
        return
    named = [("model.mlp", model.mlp), ("model.attention_layer", model.attention_layer)]
    named += [("optimizer.name", optimizer.name), *(("logger.extra", name) for name in config.logger.extra)]
    for key, name in named:
        if ":" not in name and key != "logger.extra":
            continue  # built in, or reported by the configuration
        try:
            is_one = issubclass(resolve_name(name), resolve_name(BASES[key]))
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            yield f"{key} ({name}) cannot be imported: {error}"
        else:
            if not is_one:
                yield f"{key} ({name}) is not a subclass of {BASES[key]}"


def check_run(config: TrainConfig | PrepareConfig, run_dir: Path, settings: str) -> None:
    """Raise a user error if a run or job cannot start, as far as this machine can check.

    `settings` are the arguments of prepare_data.py for the data.
    """
    here = config.launcher.where is Where.local
    if isinstance(config, PrepareConfig):
        if here and config.data.source is Source.local and not (Path(config.data.path) / "corpus.json").exists():
            list_items(config.data)  # or raise an error
        return
    is_new = not committed(run_dir / "checkpoints")
    if here or not config.launcher.setup:
        check_exists(config.data, settings)
        read_tasks(config.evaluate.tasks)
        if config.init_from is not None and is_new and not is_address(config.init_from):
            check_origin(Path(config.init_from))
    if here and not joined_environment(os.environ):  # under torchrun or srun, rank 0 may have locked it already
        check_not_held(run_dir)
    if here and (config.parallel.device is Device.cpu or not visible_gpus()):
        needed_by = "precision.fp8" if config.precision.fp8 is not Fp8.none else "parallel.cuda_graphs"
        if config.precision.fp8 is not Fp8.none or config.parallel.cuda_graphs:
            raise ParallelError(f"{needed_by} needs a GPU, and there is none here; leave it out")
    check_stored_config(run_dir, to_plain(config), config.checkpoint)
    if is_new:
        check_same_tokenizer(config)


def fits(weights: Tokenizer, data: Tokenizer) -> bool:
    """Return whether the tokens of the data mean what a model has learnt them to; the data may have more."""
    ids, others = ([ids.tolist() for ids in tokenizer.encode_many(mixed_lines())] for tokenizer in (weights, data))
    return ids == others and weights.special_ids.items() <= data.special_ids.items()


def check_same_tokenizer(config: TrainConfig) -> None:
    """Raise `CheckpointError` if the tokenizers of `init_from` and the data are known and differ."""
    key, needs = "tokenizer.model", {"model", "all"} & set(config.init_content)
    if config.init_from is None or key in config.checkpoint.accept_changes or not needs:
        return
    origin, prepared = Path(config.init_from).absolute(), Path(config.data.path, "tokenizer").absolute()
    try:
        folder = origin if (origin / "config.json").is_file() else run_dir_of(origin) / "tokenizer"
        weights = load_tokenizer(folder)
        data = load_tokenizer(prepared if config.data.source is not Source.tokens else config.data.tokenizer or folder)
    except (CheckpointError, DataError):
        return
    if not fits(weights, data):
        remedy = f"prepare it with {key}={os.path.relpath(folder)}, or pass checkpoint.accept_changes=[{key}]"
        raise CheckpointError(f"init_from ({config.init_from}) has another tokenizer than the data; {remedy}")
