"""samples.md: the samples of each prompt by step."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tracking.metrics_file import METRICS, read_records
from tracking.run_folder import write_atomically


def write_samples(run_dir: Path) -> None:
    """Write the samples of metrics.jsonl, if any, with a table per prompt."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(run_dir / METRICS):
        for sample in record.get("samples", ()):
            rows.setdefault(sample["prompt"], []).append({"step": record["step"], "text": sample["text"]})
    if rows:
        parts = [f"## {_cell(prompt)}\n\n{as_markdown(samples)}\n" for prompt, samples in rows.items()]
        write_atomically(run_dir / "samples.md", "\n".join(parts))


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(str(value)) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return f"<code>{escape(text).replace('|', '&#124;').replace(chr(10), '<br>')}</code>"
