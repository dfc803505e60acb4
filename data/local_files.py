"""Files of this machine below a folder, those behind symbolic links included."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


def identity(path: str) -> str:
    """Return what all spellings of a path have in common; an address has one."""
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def place_of(path: str) -> tuple[str, str]:
    """Return a file's real folder and its name, which order files however their folder is spelled."""
    folder, _, name = path.rpartition("/")
    return identity(folder), name


def distinct_files(paths: list[str]) -> list[str]:
    """Return paths in the order of `place_of`, each file once; a link to another of the files is left out."""
    found: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: (identity(path) != path, path)):
        found.setdefault(identity(path), path)
    return sorted(found.values(), key=place_of)


class LocalFiles(LocalFileSystem):
    """Enters the folders that symbolic links point to; counts in `left_out` what it does not."""

    cachable = False

    def __init__(self, left_out: Counter[str] | None = None) -> None:
        super().__init__()
        self.left_out = Counter() if left_out is None else left_out

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        about = super().info(path, **kwargs)
        if about["islink"] and about["type"] == "other":  # an entry of a folder
            try:
                return super().info(about["name"])
            except OSError:
                self.left_out["broken links"] += 1
        return about

    def ls(self, path: Any, detail: bool = False, **kwargs: Any) -> list[Any]:
        real = os.path.realpath(path)
        if real != str(path) and real in map(os.path.realpath, Path(path).parents):
            self.left_out["links back to a folder they are in"] += 1
            return []
        try:
            return super().ls(path, detail, **kwargs)
        except OSError:
            self.left_out["folders that cannot be read"] += 1
            return []


def token_paths(folder: str | Path) -> list[Path]:
    """Return the .bin files below a folder, or the file that it is."""
    if Path(folder).is_file():
        return [Path(folder)]
    found = LocalFiles().find(os.path.abspath(folder))
    return sorted(map(Path, distinct_files([path for path in found if path.endswith(".bin")])))
