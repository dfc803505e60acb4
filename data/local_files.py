"""Local files by path, folder or glob, following symbolic links."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from glob import has_magic
from pathlib import Path

from fsspec.utils import glob_translate

from corpus.config import DataError


def identity(path: str) -> str:
    """Return the real path of a local path; a URL is returned as it is."""
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def distinct_files(paths: Iterable[str]) -> list[str]:
    """Return sorted paths, each file once, without links to others of the files."""
    real_first = sorted(paths, key=lambda path: (identity(path) != path, path))
    return sorted({identity(path): path for path in reversed(real_first)}.values())


def matching_files(pattern: str, left_out: Counter[str]) -> tuple[str, list[str]]:
    """Return the base folder and the files that a path, folder or glob matches.

    An existing path is taken literally, even if it looks like a glob. Hidden files match only a pattern with a dot.
    Counts broken links in `left_out`; raises `OSError` if a folder cannot be read.
    """
    path = os.path.realpath(pattern) if os.path.isdir(pattern) else os.path.abspath(pattern)
    if os.path.isfile(path):
        return os.path.dirname(path), [path]
    base = path  # the part before a glob's first wildcard
    while has_magic(base) and not os.path.exists(base):
        base = os.path.dirname(base)
    rest = path[len(base) :].lstrip("/") or "**"
    matches, found = re.compile(glob_translate(rest)), []
    for here, folders, names in os.walk(base, followlinks=True, onerror=_refuse):
        is_loop = os.path.islink(here) and os.path.realpath(here) in map(os.path.realpath, Path(here).parents)
        if is_loop or ("**" not in rest and here[len(base) :].count("/") >= rest.count("/")):
            folders.clear()
        for place in (os.path.join(here, name) for name in names if not is_loop):
            inside = place[len(base) :].lstrip("/")
            is_hidden = "/." in f"/{inside}" and "/." not in f"/{rest}"
            if not matches.match(inside) or is_hidden:
                continue
            if os.path.isfile(place):
                found.append(place)
            elif os.path.islink(place):
                left_out["broken links"] += 1
    return base, found


def _refuse(error: OSError) -> None:
    raise error


def token_paths(folder: str) -> list[Path]:
    """Return the .bin files below a folder, or the file itself."""
    if os.path.isfile(folder):
        return [Path(folder)]
    try:
        found = matching_files(folder, Counter())[1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}") from None
    return sorted(map(Path, distinct_files(path for path in found if path.endswith(".bin"))))
