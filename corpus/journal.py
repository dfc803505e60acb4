"""How far a part of the work has come, written down so that a run that was killed goes on from there."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.shards import Written


@dataclass(slots=True)
class Counts:
    """What has been written so far, for the progress bar."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass(slots=True)
class Journal:
    """Where a part stands.

    Attributes:
        item, block: what comes next of the text.
        open: how far each file that still grows has been written, by stem; `closed` are the finished ones.
        read: size and time of each input file that has been read, to know whether it has changed since.
    """

    item: int = 0
    block: int = 0
    counts: Counts = field(default_factory=Counts)
    bad: dict[str, Any] = field(default_factory=dict)
    open: dict[str, Written] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    read: dict[str, list[float]] = field(default_factory=dict)
    complete: bool = False

    @staticmethod
    def load(path: Path) -> "Journal":
        stored = json.loads(path.read_text())
        stored["counts"] = Counts(**stored["counts"])
        stored["open"] = {stem: Written(**written) for stem, written in stored["open"].items()}
        return Journal(**stored)

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self)))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the machine stops."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def changed_input(partial: Path) -> str:
    """Name a file that has been read and is not what it was; nothing if there is none."""
    for path in sorted(partial.glob("journal-*.json")):
        for file, (size, modified) in Journal.load(path).read.items():
            if stamp(file) != [size, modified]:
                return f"another {file}"
    return ""


def stamp(path: str) -> list[float]:
    """Give what tells whether a file has changed: its size and time."""
    if "://" in path or not Path(path).exists():
        return [0, 0]
    return [Path(path).stat().st_size, Path(path).stat().st_mtime]
