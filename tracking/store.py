"""Copies of a run's checkpoints in an object store, or any file system of fsspec."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import xxhash

from tracking.logs import without_secrets
from tracking.retry import retried
from tracking.run_folder import STEP, read_json
from training.config import CheckpointError, DamagedError

MANIFEST = "manifest.json"
ORIGIN = ".origin"  # in the folder of a downloaded run: its address
logger = logging.getLogger(__name__)


def describe(file: IO[bytes]) -> dict[str, Any]:
    """Return the size and hash of an open file."""
    digest = hashlib.file_digest(file, xxhash.xxh3_128)  # type: ignore[arg-type]
    return {"size": file.tell(), "xxh3_128": digest.hexdigest()}


def is_address(path: str | None) -> bool:
    return path is not None and "://" in path


class Store:
    """A remote folder with checkpoints, complete if they have a manifest, and `tokenizer/`.

    Failed operations are retried, and copies verified by size and hash.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        try:
            self.fs, self.root = url_to_fs(self.address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"checkpoint.path ({address}): {error}") from error
        if self.fs.protocol == "memory":
            raise CheckpointError(f"checkpoint.path ({address}) lives in one process; use file:// or an object store")

    def names(self) -> list[str]:
        """Return the names of checkpoints, oldest first."""
        found = self._try(lambda: self.fs.glob(f"{self.root}/*/{MANIFEST}"))
        return sorted(name for path in found if STEP.fullmatch(name := path.split("/")[-2]))

    def upload(self, *files: Path) -> None:
        """Upload files in order, each to a folder with the name of its local folder."""
        for file in files:
            self._try(partial(self._put, file, f"{self.root}/{file.parent.name}/{file.name}"))

    def _put(self, file: Path, place: str) -> None:
        self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(file), place)
        with file.open("rb") as here, self.fs.open(place, "rb") as there:
            if describe(there) != describe(here):
                raise OSError(f"{place} differs from the file copied there")

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first."""
        for place in (f"{self.root}/{name}/{MANIFEST}", f"{self.root}/{name}"):
            self._try(lambda place=place: self.fs.exists(place) and self.fs.rm(place, recursive=True))

    def download_newest(self, folder: Path, *, after: str = "", step: int | None = None) -> None:
        """Download the newest intact checkpoint, or that of `step`, to a folder of checkpoints, unless it exists."""
        wanted = "" if step is None else f"step-{step:08d}"
        for name in reversed([name for name in self.names() if name > after and wanted in ("", name)]):
            if (folder / name).exists():
                return
            try:
                self.download_folder(name, folder / f".tmp-{name}")
            except DamagedError as error:
                logger.warning("%s; using an older one", error)
                continue
            os.rename(folder / f".tmp-{name}", folder / name)
            logger.info("copied %s/%s to %s", self.address, name, folder)
            return

    def download_folder(self, name: str, folder: Path) -> None:
        """Download a folder; raise `DamagedError` if a file differs from the manifest."""
        folder.mkdir(parents=True, exist_ok=True)
        listed: dict[str, Any] = {}
        places = self._try(lambda: self.fs.find(f"{self.root}/{name}"))
        for place in sorted(places, key=lambda place: not place.endswith(MANIFEST)):  # the manifest first
            here = folder / place.rpartition("/")[2]
            self._try(partial(self._get, place, here, listed.get(here.name)))
            if here.name == MANIFEST:
                listed = json.loads(here.read_text(encoding="utf-8"))["files"]

    def _get(self, place: str, here: Path, expected: dict[str, Any] | None) -> None:
        self.fs.get_file(place, str(here))
        with here.open("rb") as file:
            if expected not in (None, describe(file)):
                raise DamagedError(f"{place} is damaged: its size or hash differs from the manifest's")

    def _try(self, step: Callable[[], Any]) -> Any:
        try:
            return retried(step, lambda error: not isinstance(error, PermissionError))  # libraries raise any exception
        except DamagedError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.address}: {type(error).__name__}: {error}") from error


def local_run(path: str, step: int | None = None) -> Path:
    """Return a local path unchanged; download a remote run to runs/<name> and return that folder.

    Raises `CheckpointError` if that is the folder of another run.
    """
    if not is_address(path):
        return Path(path)
    address, _, last = (path := path.rstrip("/")).rpartition("/")
    if name := STEP.fullmatch(last):
        path, step = address, int(name[1])
    store, run_dir = Store(path), Path("runs", path.rpartition("/")[2])
    steps = [int(name.removeprefix("step-")) for name in store.names()]
    if not steps or step not in (None, *steps):
        what = f"; choose a step from {', '.join(map(str, steps))}" if steps else ""
        raise CheckpointError(f"{path} has no such checkpoint{what}")
    origin, trained = run_dir / ORIGIN, read_json(run_dir / "status.json").get("config", {}).get("checkpoint", {})
    own = f"{(trained.get('path') or '').rstrip('/')}/{run_dir.name}"  # trained here, and copied there
    known = origin.read_text(encoding="utf-8") if origin.exists() else own
    if run_dir.exists() and without_secrets(path) != without_secrets(known):
        raise CheckpointError(f"{run_dir} is not a copy of {path}; rename it, or pass another name=")
    run_dir.mkdir(parents=True, exist_ok=True)
    origin.write_text(path, encoding="utf-8")
    store.download_newest(run_dir / "checkpoints", step=step)
    store.download_folder("tokenizer", run_dir / "tokenizer")
    return run_dir
