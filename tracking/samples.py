"""samples.md: what a model wrote after each prompt, step under step."""

from html import escape
from pathlib import Path

from tracking.metrics_file import METRICS, read_records
from tracking.run_folder import write_atomically

SAMPLES = "samples.md"  # in a run folder


def write_samples(run_dir: Path) -> None:
    """Write the samples in metrics.jsonl as a table per prompt."""
    rows: dict[str, list[str]] = {}
    for record in read_records(run_dir / METRICS):
        for sample in record.get("samples", ()):
            rows.setdefault(sample["prompt"], []).append(f"| {record['step']:,} | {_cell(sample['text'])} |")
    parts = [
        "\n".join([f"## {_cell(prompt)}\n", "| step | text |", "|---:|:---|", *its]) for prompt, its in rows.items()
    ]
    write_atomically(run_dir / SAMPLES, "\n\n".join(parts) + "\n")


def _cell(text: str) -> str:
    return f"<code>{escape(text).replace('|', '&#124;').replace(chr(10), '<br>')}</code>"
