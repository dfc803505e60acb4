"""samples.md: what a model wrote after each prompt, step under step."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tracking.metrics_file import METRICS, read_records
from tracking.run_folder import write_atomically


def write_samples(run_dir: Path) -> None:
    """Write the samples in metrics.jsonl as a table per prompt; nothing if there are none."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(run_dir / METRICS):
        for sample in record.get("samples", ()):
            rows.setdefault(sample["prompt"], []).append({"step": record["step"], "text": sample["text"]})
    if rows:
        parts = [f"## {_cell(prompt)}\n\n{as_markdown(its)}\n" for prompt, its in rows.items()]
        write_atomically(run_dir / "samples.md", "\n".join(parts))


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(str(value)) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return f"<code>{escape(text).replace('|', '&#124;').replace(chr(10), '<br>')}</code>"
