"""What a run or job needs before it starts: the data it reads and the weights it begins from. Imports no torch."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from conf.schema import PrepareConfig, TrainConfig
from corpus.config import DataError, Source
from corpus.inputs import check_inputs
from data.manifest import check_exists, check_fits
from launch.config import Where
from launch.ranks import refuse_no_gpu
from tracking.origin import refuse_no_origin
from tracking.run_folder import committed, refuse_early, refuse_held
from training.config import CheckpointError, Fp8


def refuse_unready(config: TrainConfig, run_config: dict[str, Any], run_dir: Path, settings: str | None) -> None:
    """Raise the sentence that says what is missing, or that the folder and the origin are of another run.

    `settings` are those by which prepare_data.py makes the data.
    """
    for _, refuse in needs(config, run_dir, settings):
        refuse()
    _refuse_unfit(config)
    fp8 = config.precision.fp8
    refuse_no_gpu(config.parallel, None if fp8 is Fp8.none else fp8.value)
    refuse_early(run_dir, run_config, config.checkpoint)


def needs(config: TrainConfig, run_dir: Path, settings: str | None) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield what a run reads before its first step, each with what refuses it if it is not there."""
    if config.data.source is not Source.random:
        foreign = config.data.source is Source.tokens
        path = Path(config.data.input or "") if foreign else Path(config.data.path) / "corpus.json"
        yield path, partial(check_exists, config.data, settings or "with the same data settings")
    if config.init_from is not None and not committed(run_dir / "checkpoints"):
        origin = Path(config.init_from)
        yield origin, partial(refuse_no_origin, origin)


def _refuse_unfit(config: TrainConfig) -> None:
    if config.data.source in (Source.builtin, Source.local, Source.huggingface):
        check_fits(config.data, config.model.vocab_size)


def refuse_or_need(
    config: Any, run_config: dict[str, Any], run_dir: Path, settings: str | None
) -> list[tuple[Path, str]]:
    """Raise the sentence that says why a job cannot start, as far as this machine knows.

    Gives what nodes of Slurm must see, with that sentence if this machine does not see it either, or "".
    """
    here = config.launcher.where is Where.local
    if isinstance(config, PrepareConfig):
        if here:
            check_inputs(config.data)
        return []
    if here:
        refuse_held(run_dir)
        refuse_unready(config, run_config, run_dir, settings)
        return []
    _refuse_unfit(config)
    refuse_early(run_dir, run_config, config.checkpoint)
    return [(path.absolute(), _said(refuse)) for path, refuse in needs(config, run_dir, settings)]


def _said(refuse: Callable[[], None]) -> str:
    try:
        refuse()
    except (DataError, CheckpointError) as error:
        return str(error)
    return ""
