"""Checkpoints that are whole or not there: written aside, verified, hashed, and renamed into place."""

import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from training.config import CheckpointError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STEP = re.compile(r"step-(\d{8})")
# DCP's metadata is a pickle; these are the only names it may bring to life.
PICKLED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
PICKLED_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "StorageMeta"),
    ("builtins", "getattr"),
}


@dataclass(slots=True)
class Checkpoint:
    """One verified checkpoint: tensors by dotted name, and a JSON state."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, TensorStorageMetadata] = field(repr=False)

    def load_into(self, tensors: dict[str, Tensor]) -> None:
        """Read every tensor in place; names, shapes and dtypes must be those that were saved."""
        saved, wanted = set(self.tensors), set(tensors)
        if saved != wanted:
            raise CheckpointError(
                f"{self.path} holds other tensors than this run needs: missing {_some(wanted - saved)}, "
                f"not used {_some(saved - wanted)}"
            )
        self._load(tensors)

    def read(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, on the CPU, without the prefix."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read_names(names).items()}

    def read_names(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors, on the CPU."""
        saved = {name: self.tensors[name] for name in names}
        found = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in saved.items()}
        self._load(found)
        return found

    def _load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            saved = self.tensors[name]
            if saved.size != tensor.shape or saved.properties.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{self.path}: {name} is {tuple(saved.size)} {saved.properties.dtype}, "
                    f"and this run's is {tuple(tensor.shape)} {tensor.dtype}"
                )
        if tensors:
            with _one_process():
                load(dict(tensors), storage_reader=FileSystemReader(self.path), no_dist=True)


class Checkpoints:
    """The checkpoints of one run folder, which this process alone writes to."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):  # of a run that was killed while writing or removing
            shutil.rmtree(leftover)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint and commit it; on failure nothing has changed and `CheckpointError` says why."""
        final = self.folder / f"step-{step:08d}"
        if final.exists():
            return final
        partial = self.folder / f".tmp-{final.name}-{os.getpid()}"
        try:
            _write(partial, step, tensors, state)
            os.rename(partial, final)
            _fsync(self.folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {self.folder}: {_reason(error)}; it needs about "
                f"{n_bytes:,} bytes and {free:,} are free; earlier checkpoints are untouched"
            ) from error
        self._purge()
        return final

    def newest(self) -> Checkpoint | None:
        """Give the newest good checkpoint; a damaged one is named, set aside as `.corrupt`, and the next tried."""
        found = _steps(self.folder)
        for path in found:
            try:
                return _open(path)
            except CheckpointError as error:
                aside = path.with_name(f"{path.name}.corrupt")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
                logger.warning("%s; set aside as %s", error, aside.name)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; the run is not started over by itself"
            )
        return None

    def _purge(self) -> None:
        if not self.keep:
            return
        for path in _steps(self.folder)[self.keep :]:
            trash = path.with_name(f".trash-{path.name}")  # a removal that is cut short leaves nothing that looks whole
            os.rename(path, trash)
            shutil.rmtree(trash, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest good one of a run folder, changing nothing."""
    if (path / "manifest.json").exists() or STEP.fullmatch(path.name):
        return _open(path)
    found = _steps(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"there is no checkpoint in {path}; name a run folder such as runs/demo, or one of its checkpoints"
        )
    for candidate in found:
        try:
            return _open(candidate)
        except CheckpointError as error:
            logger.warning("%s; trying an older one", error)
    raise CheckpointError(f"every checkpoint in {path / 'checkpoints'} is damaged")


def _steps(folder: Path) -> list[Path]:
    """Committed checkpoints, newest step first; file times say nothing."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP.fullmatch(path.name)), reverse=True)


def _write(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # One thread: a writer of several can lose an error of one of them.
    writer = FileSystemWriter(folder, thread_count=1, single_file_per_rank=True)
    with _one_process():
        save(dict(tensors), storage_writer=writer, no_dist=True)
    written = _read_metadata(folder)
    if set(written) != set(tensors):
        raise RuntimeError(f"{_some(set(tensors) - set(written))} were not written")
    text = json.dumps({"step": step, **state}, indent=1, allow_nan=False, sort_keys=True)
    (folder / "state.json").write_text(text + "\n")
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in folder.iterdir():
        _fsync(path)
    _fsync(folder)


@contextmanager
def _one_process() -> Iterator[None]:
    """DCP warns that it saves in a single process even when told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _open(path: Path) -> Checkpoint:
    """Verify a checkpoint against its manifest and open it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, step, version = manifest["files"], manifest["step"], manifest["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no manifest.json: it is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}/manifest.json is damaged") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version}; this code reads {FORMAT_VERSION}")
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes of {expected['size']}: it was cut short")
        if _describe(file) != expected:
            raise CheckpointError(f"{file} is not what was written: its hash differs from the manifest's")
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, step, state, _read_metadata(path))


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = module in PICKLED_MODULES or (module, name) in PICKLED_NAMES
        allowed = allowed or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        allowed = allowed or (module.startswith("pathlib") and name in ("Path", "PosixPath"))
        if not allowed:
            raise CheckpointError(
                f"its .metadata asks for {module}.{name}, which no checkpoint needs; it is not loaded"
            )
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Read the tensors' names, shapes and dtypes, without running what a pickle could run."""
    with (folder / ".metadata").open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder}/.metadata is damaged: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder}/.metadata is no metadata")
    entries = metadata.state_dict_metadata
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: {name} is not a tensor, and is not loaded")
    return entries  # type: ignore[return-value]


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


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
