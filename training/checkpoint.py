"""Checkpoints that are whole or not there: written aside, verified, hashed, and renamed into place.

Every rank writes and hashes what it holds; rank 0 alone commits, removes, and decides which one is read.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tracking.run_folder import checkpoints_in, committed
from training.config import CheckpointError
from training.metadata import MetadataReader, check_complete, read_metadata
from training.ranks import Ranks, reason_of, some

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# States of one rank each: resumed by another number of ranks, there are more or fewer of them.
PER_RANK = "rng."


@dataclass(slots=True)
class Checkpoint:
    """One verified checkpoint: tensors by dotted name, and a JSON state."""

    path: Path
    step: int
    state: dict[str, Any]
    metadata: Metadata = field(repr=False)
    ranks: Ranks = field(repr=False, default_factory=Ranks)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        return self.metadata.state_dict_metadata  # type: ignore[return-value]

    def load_into(self, tensors: dict[str, Tensor]) -> None:
        """Read every tensor in place, each rank its part, whatever the layout it was saved from.

        Names, shapes and dtypes, over all ranks, must be those that were saved.
        """
        self.ranks.together(lambda: _shapes(tensors), self._check_names)
        self.load(tensors)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Read the named tensors in place, each rank its part; shapes and dtypes must be those that were saved."""

        def read() -> None:
            self._check_shapes(_shapes(tensors))
            if tensors:
                with _one_process():
                    load(dict(tensors), storage_reader=MetadataReader(self.path, self.metadata), no_dist=True)

        self.ranks.together(read, lambda _: None)

    def read(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, whole, on the CPU, without the prefix."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read_names(names).items()}

    def read_names(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors, whole, on the CPU."""
        saved = {name: self.tensors[name] for name in names}
        found = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in saved.items()}
        self.load(found)
        return found

    def _check_names(self, parts: list[dict[str, Any]]) -> None:
        wanted = {name: shape for part in parts for name, shape in part.items()}
        missing, unused = wanted.keys() - self.tensors.keys(), self.tensors.keys() - wanted.keys()
        unused = {name for name in unused if not name.startswith(PER_RANK)}
        if missing or unused:
            raise CheckpointError(
                f"{self.path} holds other tensors than this run needs: missing {some(missing)}, not used {some(unused)}"
            )
        self._check_shapes(wanted)

    def _check_shapes(self, wanted: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
        wrong = []
        for name, (shape, dtype) in wanted.items():
            saved = self.tensors[name]
            if (saved.size, saved.properties.dtype) != (shape, dtype):
                there = f"{tuple(saved.size)} {saved.properties.dtype}"
                wrong.append(f"{name} is {there}, and this run's is {tuple(shape)} {dtype}")
        if wrong:
            more = f"; {len(wrong) - 3} more differ" if len(wrong) > 3 else ""
            raise CheckpointError(f"{self.path}: {'; '.join(wrong[:3])}{more}")


class Checkpoints:
    """The checkpoints of one run folder, which the ranks of one group alone write to."""

    def __init__(self, run_dir: Path, *, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.ranks = Ranks(group)
        self.ranks.on_first(self._sweep)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint and commit it, all ranks together; of a tensor each writes what it holds.

        On failure, on whichever rank, nothing has changed and `CheckpointError` says why, everywhere.
        """
        final = self.folder / f"step-{step:08d}"
        text = json.dumps({"step": step, **state}, indent=1, allow_nan=False, sort_keys=True)
        if self.ranks.on_first(final.exists):
            return final
        partial_dir = self.ranks.on_first(lambda: self.folder / f".tmp-{final.name}-{os.getpid()}")
        try:
            _write(partial_dir, step, tensors, text, self.ranks)
            self.ranks.on_first(lambda: self._commit(partial_dir, final))
        except CheckpointError as error:
            if self.ranks.rank == 0:
                shutil.rmtree(partial_dir, ignore_errors=True)
            n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {self.folder}: {error}; it needs about "
                f"{n_bytes:,} bytes and {free:,} are free; earlier checkpoints are untouched"
            ) from error
        self.ranks.on_first(self._purge)
        return final

    def newest(self) -> Checkpoint | None:
        """Give the newest good checkpoint; damaged ones after it are named and set aside as `.corrupt`.

        If none is good they stay where they are, and are refused again. Rank 0 decides: what another rank would see of
        the disk may be old.
        """
        damaged: dict[Path, str] = {}
        for path in self.ranks.on_first(lambda: committed(self.folder)):
            try:
                good = _open(path, self.ranks)
            except CheckpointError as error:
                damaged[path] = str(error)
                continue
            self.ranks.on_first(lambda: [_set_aside(path, reason) for path, reason in damaged.items()])
            return good
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(damaged.values())}); the run is not started "
                "over by itself: bring one back, or pass another name="
            )
        return None

    def _sweep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):  # of a run that was killed while writing or removing
            shutil.rmtree(leftover)

    def _commit(self, partial_dir: Path, final: Path) -> None:
        os.rename(partial_dir, final)
        _fsync(self.folder)

    def _purge(self) -> None:
        if not self.keep:
            return
        for path in committed(self.folder)[self.keep :]:
            trash = path.with_name(f".trash-{path.name}")  # a removal that is cut short leaves nothing that looks whole
            try:
                os.rename(path, trash)
            except OSError as error:
                logger.warning("%s could not be removed: %s", path, error)
            shutil.rmtree(trash, ignore_errors=True)


def open_checkpoint(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Open a checkpoint folder, or the newest good one of a run folder, changing nothing."""
    ranks = ranks or Ranks()
    found = ranks.on_first(lambda: checkpoints_in(path))
    for candidate in found:
        try:
            return _open(candidate, ranks)
        except CheckpointError as error:
            if found == [path]:
                raise
            logger.warning("%s; trying an older one", error)
    raise CheckpointError(
        f"every checkpoint in {path / 'checkpoints'} is damaged; "
        "name another run or checkpoint, or train this one again"
    )


def _write(folder: Path, step: int, tensors: dict[str, Tensor], text: str, ranks: Ranks) -> None:
    """Write all files of a checkpoint, so that they outlast a loss of power, and see that they are all there."""

    def make_folder() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def own_files() -> tuple[dict[str, Any], list[str]]:
        paths = sorted(folder.glob(f"__{ranks.rank}_*"))
        return {path.name: _durable(path) for path in paths}, list(tensors)

    def finish(parts: list[tuple[dict[str, Any], list[str]]]) -> None:
        files = {name: about for part, _ in parts for name, about in part.items()}
        unseen = {name for name in files if not (folder / name).exists()}
        if unseen:
            raise CheckpointError(f"rank 0 does not see {some(unseen)}: all nodes must share the run folder")
        names = {name for _, part in parts for name in part}
        check_complete(read_metadata(folder), names, {name: about["size"] for name, about in files.items()})
        (folder / "state.json").write_text(text + "\n")
        for name in (".metadata", "state.json"):
            files[name] = _durable(folder / name)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": dict(sorted(files.items()))}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _fsync(folder / "manifest.json")
        _fsync(folder)

    ranks.on_first(make_folder)
    # One thread: a writer of several can lose an error of one of them.
    writer = FileSystemWriter(folder, thread_count=1, single_file_per_rank=True)
    alone = ranks.group is None
    try:
        with _one_process():
            save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=alone)
    except (OSError, RuntimeError, CheckpointException) as error:  # DCP raises one of a rank's on all
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in failures):
            raise KeyboardInterrupt from None  # a second Ctrl-C, and no failure
        raise CheckpointError(reason_of(error)) from error
    ranks.together(own_files, finish)


def _durable(path: Path) -> dict[str, Any]:
    """Describe a file that is from now on safe from a loss of power."""
    _fsync(path)
    return _describe(path)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    logger.warning("%s; set aside as %s", reason, aside.name)


@contextmanager
def _one_process() -> Iterator[None]:
    """DCP warns that it saves in a single process even when told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _open(path: Path, ranks: Ranks) -> Checkpoint:
    """Verify a checkpoint against its manifest, each rank a share of the files, and open it."""
    step, files = ranks.on_first(partial(_read_manifest, path))
    largest_first = sorted(files, key=lambda name: (-files[name]["size"], name))
    mine = largest_first[ranks.rank :: ranks.size]

    def read(_: list[None]) -> tuple[dict[str, Any], Metadata]:
        metadata = read_metadata(path)
        named = {place.relative_path for place in (metadata.storage_data or {}).values()}
        if named - set(files):
            raise CheckpointError(f"{path}/.metadata names {some(named - set(files))}, which its manifest does not")
        return json.loads((path / "state.json").read_text()), metadata

    state, metadata = ranks.together(lambda: _verify(path, {name: files[name] for name in mine}), read)
    return Checkpoint(path, step, state, metadata, ranks)


def _read_manifest(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, step, version = manifest["files"], manifest["step"], manifest["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no manifest.json: it is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}/manifest.json is damaged") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version}; this code reads {FORMAT_VERSION}")
    return step, files


def _verify(path: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes of {expected['size']}: it was cut short")
        if _describe(file) != expected:
            raise CheckpointError(f"{file} is not what was written: its hash differs from the manifest's")


def _describe(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
