"""Atomic checkpoints: written to a temporary folder, verified, hashed, and renamed into place.

Every rank writes and hashes its shards; rank 0 commits, removes, and chooses the checkpoint to read.
"""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from parallel.shards import local
from tracking.metrics_file import METRICS, read_records
from tracking.retry import retried
from tracking.run_folder import checkpoints_in, committed, write_atomically
from tracking.store import Store, describe
from training.config import CheckpointConfig, CheckpointError, DamagedError, IncompleteError, SaveError
from training.metadata import MetadataReader, check_complete, read_metadata
from training.optim.master_weights import Parts, whole
from training.ranks import Ranks, reason_of, some
from training.writer_process import direct

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
READABLE_SINCE = "0.1.0"  # the first version of this repository that reads the format
PER_RANK = "rng."  # tensors of one rank each, whose number may change on resume
BEGUN = ".begun"  # marks the run's checkpoint folder, as opposed to the mount point of a disk that is not mounted

Files = dict[str, dict[str, Any]]  # size and hash, by name


@dataclass(slots=True)
class Checkpoint:
    """A verified checkpoint: tensors by dotted name, and a JSON state."""

    path: Path
    step: int
    state: dict[str, Any]
    metadata: Metadata = field(repr=False)
    ranks: Ranks = field(repr=False, default_factory=Ranks)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        return self.metadata.state_dict_metadata  # type: ignore[return-value]

    def load(self, tensors: dict[str, Tensor], *, exact: bool = False) -> None:
        """Read the named tensors in place, resharding if the layout has changed.

        Shapes and dtypes must match the checkpoint; if `exact`, so must the names over all ranks.
        """
        wanted = set().union(*self.ranks.all_gather(lambda: set(tensors)))
        missing = wanted - self.tensors.keys()
        unused = {name for name in self.tensors.keys() - wanted if exact and not name.startswith(PER_RANK)}
        if missing or unused:
            raise CheckpointError(f"{self.path} does not fit: missing {some(missing)}, unused {some(unused)}")

        def read() -> None:
            wrong = [
                f"{name} ({tuple(saved.size)} {saved.properties.dtype}, now {tuple(tensor.shape)} {tensor.dtype})"
                for name, tensor in tensors.items()
                if ((saved := self.tensors[name]).size, saved.properties.dtype) != (tensor.shape, tensor.dtype)
            ]
            if wrong:
                raise CheckpointError(f"{self.path}: {some(wrong)} do not fit")
            if tensors:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by no_dist
                load(dict(tensors), storage_reader=MetadataReader(self.path, self.metadata), no_dist=True)

        self.ranks.all_gather(read)

    def read(self, prefix: str) -> dict[str, Tensor]:
        """Read the full tensors whose names start with `prefix`, on the CPU, by name without the prefix."""
        tensors = self.read_names(name for name in self.tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def read_names(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the named full tensors on the CPU."""
        found = {n: torch.empty(self.tensors[n].size, dtype=self.tensors[n].properties.dtype) for n in names}
        self.load(found)
        return found


class Checkpoints:
    """The checkpoints of a run folder, written by the ranks of a group, and copied to a store if there is one."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, group: dist.ProcessGroup | None = None) -> None:
        self.folder, self.config, self.ranks = run_dir / "checkpoints", config, Ranks(group)
        self.store = Store(f"{config.path.rstrip('/')}/{run_dir.name}") if config.path else None
        self.saved: Path | None = None
        self.saved_bytes = 0  # by the last save, on all ranks
        self.ranks.on_first(self._sweep)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        parts: Mapping[str, Parts] | None = None,
        call: Callable[..., Any] = direct,
    ) -> Path:
        """Write and commit a checkpoint; a collective, in which each rank writes its shards.

        `parts` have the data of tensors that are only shapes. `call(function, ...)` runs what reads them and the files.

        If any rank fails, nothing has changed and every rank raises `SaveError`. If only the copy to the store
        failed, another call repeats the copy alone.
        """
        final = self.folder / f"step-{step:08d}"
        text = json.dumps({"step": step, **state}, indent=1, allow_nan=False, sort_keys=True)
        if self.store is not None and self.saved == final:
            self._copy(final)
            return final
        partial_dir = self.folder / f".tmp-{final.name}"
        try:
            if self.ranks.on_first(final.exists):
                raise CheckpointError(f"{final} exists")
            parts = {name: (local(tensor),) for name, tensor in tensors.items()} if parts is None else parts
            self.saved_bytes = _write(partial_dir, step, tensors, text, self.ranks, parts, call)
            self.ranks.on_first(lambda: (final.exists() or os.rename(partial_dir, final), _fsync(self.folder)))
        except CheckpointError as error:
            needed, free = sum(tensor.nbytes for tensor in tensors.values()), "an unknown number"
            with suppress(OSError):
                free = f"{shutil.disk_usage(self.folder).free:,}"
            if self.ranks.rank == 0:
                shutil.rmtree(partial_dir, ignore_errors=True)
            why = f"{error} (about {needed:,} bytes are needed, {free} are free); earlier checkpoints are untouched"
            raise SaveError(f"step {step} was not saved to {self.folder}: {why}") from error
        self.saved = final
        removed = self.ranks.on_first(self._purge)
        self._copy(final, removed)
        return final

    def _copy(self, checkpoint: Path, removed: Iterable[str] = ()) -> None:
        """Copy a committed checkpoint to the store, each rank its files, and remove old ones there."""
        store, tokenizer = self.store, self.folder.parent / "tokenizer"
        if store is None:
            return
        last = [checkpoint / name for name in (".metadata", "state.json", "manifest.json")]
        try:
            self.ranks.all_gather(lambda: store.upload(*checkpoint.glob(f"__{self.ranks.rank}_*")))
            self.ranks.on_first(lambda: store.upload(*tokenizer.glob("*"), *last))
            self.ranks.on_first(lambda: [store.remove(name) for name in removed])
        except CheckpointError as error:
            raise SaveError(f"{checkpoint} was saved, but not copied: {error}") from error

    def newest(self, load: Callable[[Checkpoint], object] = lambda _: None) -> Checkpoint | None:
        """Return the newest intact checkpoint for which `load` raises no `DamagedError`.

        Newer ones, which are damaged, are logged and set aside, unless all are damaged: then raise `CheckpointError`.
        Rank 0 lists the folder, because other ranks may have a stale view of a shared file system.
        """
        good, damaged = _first_good(self.ranks.on_first(self._found), self.ranks, load)
        if good is not None:
            self.ranks.on_first(lambda: [_set_aside(path, error) for path, error in damaged.items()])
        elif damaged:
            what = f"every checkpoint in {self.folder} is damaged ({'; '.join(map(str, damaged.values()))})"
            raise CheckpointError(f"{what}; restore one, or pass another name=")
        return good

    def _found(self) -> list[Path]:
        own = committed(self.folder)
        if self.store is not None:
            self.store.download_newest(self.folder, after=own[0].name if own else "")
        return committed(self.folder)

    def _sweep(self) -> None:
        """Check that the folder is the run's and is writable; remove leftovers of a killed run."""
        begun, metrics = self.folder / BEGUN, self.folder.parent / METRICS
        if not (begun.exists() or committed(self.folder)) and read_records(metrics):
            what = f"{metrics} exists but {self.folder} has no checkpoints: it may not be mounted"
            raise CheckpointError(f"{what}; restore it, pass another name=, or remove {metrics} to start over")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(begun, "")
        for leftover in set(self.folder.glob(".*")) - {begun}:
            _remove(leftover)

    def _purge(self) -> list[str]:
        """Remove checkpoints that need not be kept; return their names."""
        found = committed(self.folder)
        best = min(found, key=_valid_loss) if self.config.keep_best else None
        past = [path for path in found[self.config.keep or len(found) :] if path != best]
        if every := self.config.keep_every:
            past = [path for path in past if int(path.name.removeprefix("step-")) % every]
        return [path.name for path in past if _remove(path)]


def _valid_loss(checkpoint: Path) -> float:
    """Return the validation loss of a checkpoint; inf if it is not finite or of another step."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        loss, validated_step = state["progress"]["valid_loss"], state["progress"]["validated_step"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return math.inf if loss is None or validated_step != state["step"] else loss


def open_checkpoint(path: Path, ranks: Ranks | None = None, *, step: int | None = None) -> Checkpoint:
    """Open a checkpoint folder, or a run folder's checkpoint of `step` or newest intact one, read-only."""
    ranks = ranks or Ranks()
    good, damaged = _first_good(ranks.on_first(lambda: checkpoints_in(path, step)), ranks)
    if good is None:
        raise CheckpointError(f"{'; '.join(map(str, damaged.values()))}; name another run or checkpoint")
    for error in damaged.values():
        logger.warning("%s; using an older one", error)
    return good


def _first_good(
    paths: list[Path], ranks: Ranks, load: Callable[[Checkpoint], object] = lambda _: None
) -> tuple[Checkpoint | None, dict[Path, DamagedError]]:
    """Return the first checkpoint that is intact and loads, and the errors of those before it."""
    damaged: dict[Path, DamagedError] = {}
    for path in paths:
        try:
            checkpoint = _open(path, ranks)
            load(checkpoint)
            return checkpoint, damaged
        except DamagedError as error:
            damaged[path] = error
    return None, damaged


class _Writer(FileSystemWriter):
    """Plans in this process and writes by `call`, in this or another one.

    With one thread, because with several an error can be lost; raises the original OSError.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Parts], call: Callable[..., Any] = direct) -> None:
        # Copying ahead would synchronize with all work of the device, including training.
        super().__init__(folder, thread_count=1, single_file_per_rank=True, per_thread_copy_ahead=0)
        self.folder, self.parts, self.call = folder, parts, call

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        names = {item.index.fqn for item in plan.items}
        parts = {name: tensors for name, tensors in self.parts.items() if name in names}
        written: Future = Future()
        written.set_result(retried(lambda: self.call(_write_items, self.folder, plan, parts)))
        return written

    def write_items(self, plan: SavePlan) -> list[Any]:
        planner: Any = SimpleNamespace(resolve_data=lambda item: whole(self.parts[item.index.fqn]).detach())
        try:
            return super().write_data(plan, planner).value()
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from error


def _write_items(folder: Path, plan: SavePlan, parts: Mapping[str, Parts]) -> list[Any]:
    """Write a rank's file, in any process."""
    return _Writer(folder, parts).write_items(plan)


def _describe_all(folder: Path, pattern: str) -> Files:
    return {path.name: _describe(path, sync=True) for path in folder.glob(pattern)}


def _write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    text: str,
    ranks: Ranks,
    parts: Mapping[str, Parts],
    call: Callable[..., Any],
) -> int:
    """Write and fsync all files, check that they are complete, and return the size of the tensor files."""

    def make_folder() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def own_files() -> tuple[Files, set[str]]:
        return call(_describe_all, folder, f"__{ranks.rank}_*"), set(tensors)

    def finish() -> None:
        files = {name: entry for described, _ in own for name, entry in described.items()}
        for name in files:
            (folder / name).stat()  # fails unless all nodes share the run folder
        names = set().union(*(saved for _, saved in own))
        check_complete(read_metadata(folder), names, {name: entry["size"] for name, entry in files.items()})
        (folder / "state.json").write_text(text + "\n", encoding="utf-8")
        for name in (".metadata", "state.json"):
            files[name] = _describe(folder / name, sync=True)
        version = {"format_version": FORMAT_VERSION, "readable_since": READABLE_SINCE}
        manifest = {**version, "step": step, "files": dict(sorted(files.items()))}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _fsync(folder / "manifest.json")
        _fsync(folder)

    ranks.on_first(make_folder)
    try:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by no_dist
        writer = _Writer(folder, parts, call)
        save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.group is None)
    except (OSError, RuntimeError, CheckpointException) as error:  # DCP raises one rank's error on all
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in failures):
            raise KeyboardInterrupt from None  # a second Ctrl-C
        raise CheckpointError(reason_of(error)) from error
    own = ranks.all_gather(own_files)
    ranks.on_first(finish)
    return sum(entry["size"] for described, _ in own for entry in described.values())


def _open(path: Path, ranks: Ranks) -> Checkpoint:
    """Verify a checkpoint against its manifest, with the files divided among ranks, and open it."""
    step, files = ranks.on_first(partial(_read_manifest, path))
    largest_first = sorted(files, key=lambda name: (-files[name]["size"], name))
    mine = {name: files[name] for name in largest_first[ranks.rank :: ranks.size]}
    ranks.all_gather(lambda: _verify(path, mine))

    def read() -> tuple[dict[str, Any], Metadata]:
        metadata = read_metadata(path)
        if unlisted := {place.relative_path for place in (metadata.storage_data or {}).values()} - files.keys():
            raise DamagedError(f"{path}/.metadata names {some(unlisted)}, which its manifest does not")
        return json.loads((path / "state.json").read_text(encoding="utf-8")), metadata

    state, metadata = ranks.on_first(read)
    return Checkpoint(path, step, state, metadata, ranks)


def _read_manifest(path: Path) -> tuple[int, Files]:
    text = (path / "manifest.json").read_text(encoding="utf-8", errors="replace")
    try:
        manifest = json.loads(text)
        files, step, version = manifest["files"], manifest["step"], int(manifest["format_version"])
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{path}/manifest.json is damaged") from None
    if version != FORMAT_VERSION:
        since = manifest.get("readable_since", "another one")
        what = f"{path} has format_version {version}, this code reads {FORMAT_VERSION}"
        raise CheckpointError(f"{what}; use version {since} of it, or name another checkpoint")
    return step, files


def _verify(path: Path, files: Files) -> None:
    sizes = {name: (path / name).stat().st_size for name in files}
    for name, expected in files.items():
        if sizes[name] != expected["size"]:
            raise DamagedError(f"{path / name} has {sizes[name]} bytes of {expected['size']}")
        if _describe(path / name) != expected:
            raise DamagedError(f"{path / name} is damaged: its hash differs from the manifest's")


def _set_aside(path: Path, error: DamagedError) -> None:
    aside = path.with_name(f"{path.name}.{'incomplete' if isinstance(error, IncompleteError) else 'corrupt'}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    logger.warning("%s; set aside as %s", error, aside.name)


def _remove(folder: Path) -> bool:
    """Remove a folder, or warn; return whether its name is free now."""
    trash = folder.with_name(f".trash-{folder.name.removeprefix('.trash-')}")  # no partial checkpoint, if interrupted
    try:
        os.rename(folder, trash)
        shutil.rmtree(trash)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)
    return not folder.exists()


def _describe(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """Return a file's size and hash, after an fsync if `sync`."""
    if sync:
        _fsync(path)
    with path.open("rb") as file:
        return describe(file)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
