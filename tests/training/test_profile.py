"""The table of a step against steps whose parts are known."""

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.conftest import trained
from training.profile import ORDER, kind_of, time_by_kind


def test_overlapping_time_is_counted_once_and_adds_up() -> None:
    intervals = [
        (0.0, 4.0, "communication"),  # hidden from 1 to 3 behind a product
        (1.0, 3.0, "GEMM"),
        (2.0, 5.0, "elementwise"),
        (7.0, 20.0, "optimizer"),  # goes on past the end
        (7.5, 9.0, "GEMM"),  # within the update
    ]
    parts = time_by_kind(intervals, 0.0, 10.0)
    found = {"communication": 1, "GEMM": 2, "elementwise": 2, "optimizer": 3, "idle": 2}
    assert parts == {**dict.fromkeys(ORDER, 0.0), **found} and sum(parts.values()) == 10


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention"),
        ("triton_poi_fused_mul_silu_1", "elementwise"),
        ("_adamw_kernel", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
        ("_statistics_kernel", "loss"),
    ],
)
def test_kernels_are_sorted_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_command_writes_trace_and_table(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture) -> None:
    assert trained(tmp_path / "r", *small, "profile=true") is None
    folder = tmp_path / "r" / "profile"
    rows = dict(re.findall(r"^(\S+) +([\d.]+) +[\d.]+%$", (folder / "table.txt").read_text(), flags=re.M))
    assert float(rows["step"]) == pytest.approx(sum(float(v) for k, v in rows.items() if k != "step"), abs=0.01)
    assert all(float(rows[kind]) > 0 for kind in ("GEMM", "attention", "loss", "optimizer", "elementwise"))
    text = (folder / "table.txt").read_text()
    launches, *times = re.findall(r"(?:launches per step:|host|step) ([\d,.]+)(?: ms)?(?=[,\n])", text)
    assert int(launches.replace(",", "")) > 0 and len(times) == 4 and all(float(time) > 0 for time in times)
    assert float(times[0]) <= float(times[1]) and float(times[2]) <= float(times[3])
    with gzip.open(folder / "trace.json.gz") as file:
        assert any(event.get("name") == "profiled steps" for event in json.load(file)["traceEvents"])
    assert not list((tmp_path / "r" / "checkpoints").glob("step-*"))
