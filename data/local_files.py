"""Files of this machine below a folder, those behind symbolic links included."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path


def identity(path: str) -> str:
    """Return what all spellings of a path have in common; an address has one."""
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def distinct_files(paths: Iterable[str]) -> list[str]:
    """Return sorted paths, each file once; a link to another of the files is left out."""
    real_first = sorted(paths, key=lambda path: (identity(path) != path, path))
    return sorted({identity(path): path for path in reversed(real_first)}.values())


def files_below(folder: str, left_out: Counter[str], depth: int | None = None) -> Iterator[str]:
    """Yield the files of a folder and of `depth` - 1 levels below it; counts in `left_out` what cannot be read."""
    for here, folders, names in os.walk(folder, followlinks=True, onerror=lambda _: left_out.update(["no permission"])):
        if (real := os.path.realpath(here)) != here and real in map(os.path.realpath, Path(here).parents):
            left_out["links back to a folder they are in"] += 1
            folders.clear()
            continue
        if depth is not None and here.removeprefix(folder).count("/") >= depth - 1:
            folders.clear()
        for path in (os.path.join(here, name) for name in names):
            if os.path.isfile(path):
                yield path
            elif os.path.islink(path):
                left_out["broken links"] += 1


def token_paths(folder: str) -> list[Path]:
    """Return the .bin files below a folder, or the file that it is."""
    below = (path for path in files_below(os.path.abspath(folder), Counter()) if path.endswith(".bin"))
    return [Path(folder)] if os.path.isfile(folder) else sorted(map(Path, distinct_files(below)))
