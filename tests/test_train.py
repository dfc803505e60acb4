"""Whole runs: that they learn, stop, go on as if they had never stopped, and refuse what is wrong."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from data.batches import IGNORED, Batch
from tests.conftest import ROOT, metrics, ran, trained
from tracking.metrics_file import METRICS, read_records
from training.checkpoint import open_checkpoint
from training.config import CheckpointError, TrainingError
from training.loop import Periodic, Run
from training.resume import RunCheckpoints
from training.state import TrainState
from training.stop import StopRequest

LONG = ["steps=12", "checkpoint.every=3", "valid_every=4", "checkpoint.keep=0"]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-identical weights, optimizer state and metrics."""
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.step == second.step and first.state["progress"] == second.state["progress"]
    a, b = first.read(""), second.read("")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(one) == metrics(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained(folder, *small, *LONG)
    return folder


def test_a_run_learns_and_writes_its_files(tmp_path: Path, small: list[str]) -> None:
    settings = ["steps=150", "valid_every=50", "optimizer.lr=1e-2", "logger=tensorboard"]
    valid_loss = trained(tmp_path / "r", *small, *settings)
    records = metrics(tmp_path / "r")
    valid = [record["valid/loss"] for record in records if "valid/loss" in record]
    assert len(valid) == 3 and valid[-1] == valid_loss and valid[0] > valid[-1]
    assert records[0]["train/loss"] == pytest.approx(6.93, abs=0.05) and records[-1]["valid/loss"] < 5.5
    keys = {"train/loss/code", "train/accuracy/prose", "train/perplexity", "train/bits_per_byte/code"}
    assert keys <= {key for record in records for key in record}
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"metrics.jsonl", "loss.png", "config.yaml", "tokenizer", "checkpoints", "tensorboard"} <= names


@pytest.mark.parametrize(("checkpointing", "internlm"), [("none", "0.0003441"), ("full", "0.0003932")])
def test_a_run_describes_itself_first(
    tmp_path: Path,
    small: list[str],
    corpus_dir: Path,
    caplog: pytest.LogCaptureFixture,
    checkpointing: str,
    internlm: str,
) -> None:
    settings = [*small, "steps=1", f"parallel.activation_checkpointing={checkpointing}"]
    caplog.set_level(logging.INFO)
    trained(tmp_path / "r", *settings)
    weights = open_checkpoint(tmp_path / "r").read("model.")
    n_params = sum(weight.numel() for weight in weights.values())
    lines = [record.message for record in caplog.records]
    first = lines.index(f"model      tiny: {n_params:,} parameters, 2 layers x 32, vocabulary 1,024")
    # Matrices: 2 layers of 9,216 weights and the head's 32,768; attention: 2 layers, 2 products, 16.5 keys of width 32.
    causal = 6 * (2 * 9_216 + 32_768 + 2 * 2 * 16.5 * 32)
    # InternLM: 3 or 4 passes of 2 layers of (8 + 6 x 2) x 32^2 + 4 x 32 x 32, and 6 x 32 x 1,024.
    assert f"{causal / 1e9:.4g} GFLOP per token (causal), {internlm} by InternLM" in lines[first + 1]
    train, valid = (json.loads((corpus_dir / "corpus.json").read_text())["splits"][s] for s in ("train", "valid"))
    n_tokens, n_packs = sum(s["tokens"] for s in train.values()), sum(-(-s["tokens"] // 32) for s in train.values())
    data = f"data       local: {n_tokens:,} training tokens in {n_packs:,} packs of 32, sources code, prose"
    assert lines[first + 2] == data and valid.keys() == train.keys()
    assert lines[first + 3].startswith(
        "batch      128 tokens, micro-batches per rank: 2 of 64; steps: 1; epochs: code "
    )
    assert lines[first + 5] == "optimizer  adamw"
    assert lines[first + 6].startswith("device     CPU (threads: 2), fp32, attention ")
    assert lines[first + 7] == "start      step 0"
    caplog.clear()
    trained(tmp_path / "r", *settings)
    assert "start      step 1, nothing is left to train" in caplog.messages


@pytest.mark.parametrize("first_has_bf16", [False, True])
def test_auto_precision_resumes_in_the_other_dtype(
    tmp_path: Path, small: list[str], corpus_dir: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, first_has_bf16: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder, manifest = tmp_path / "r", tmp_path / "tokens" / "corpus.json"
    shutil.copytree(corpus_dir, manifest.parent)
    about = json.loads(manifest.read_text())
    del about["splits"]["valid"]["code"]
    manifest.write_text(json.dumps(about))
    settings = [*small, f"data.path={manifest.parent}", "precision=auto", "steps=4"]
    restored: dict[str, torch.Tensor] = {}
    restore = RunCheckpoints.restore

    def noting(self: RunCheckpoints, checkpoint: Any) -> None:
        restore(self, checkpoint)
        restored.update({name: tensor.clone() for name, tensor in self.optimizer.state_tensors().items()})

    monkeypatch.setattr(RunCheckpoints, "restore", noting)
    caplog.set_level(logging.INFO)
    for has_bf16, stop in ((first_has_bf16, "2"), (not first_has_bf16, "")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=has_bf16: found)
        (tmp_path / "stop").write_text(stop)
        trained(folder, *settings, f"checkpoint.stop_file={tmp_path / 'stop'}")
    saved = open_checkpoint(folder / "checkpoints" / "step-00000002").read("")
    assert restored and all(torch.equal(tensor, saved[name]) for name, tensor in restored.items())
    assert open_checkpoint(folder).step == 4
    for words in ("bf16 (auto)", "fp32 (auto: this CPU has no bf16", "; no validation documents of code"):
        assert words in caplog.text


FIRST_STEP = """
import sys
from pathlib import Path
from tests.conftest import trained
from training.report import StepReport

heavy = ("torch._dynamo", "torch.distributed.pipelining", "matplotlib", "tensorboard", "transformers", "datasets", "wandb")
StepReport.step = lambda *_, **__: sys.exit("imported: " + " ".join(name for name in heavy if name in sys.modules))
trained(Path(sys.argv[1]), *sys.argv[2:])
"""


def test_the_first_step_imports_no_compiler_and_no_plots(tmp_path: Path, small: list[str]) -> None:
    done = ran("-c", FIRST_STEP, str(tmp_path / "r"), *small, code=1)
    assert done.stderr.splitlines()[-1] == "imported: "


@pytest.mark.parametrize("stop_at", [4, 7])
def test_resume_after_a_stop_file(tmp_path: Path, small: list[str], uninterrupted: Path, stop_at: int) -> None:
    (tmp_path / "stop").write_text(str(stop_at))
    trained(tmp_path / "r", *small, *LONG, f"checkpoint.stop_file={tmp_path / 'stop'}")
    assert open_checkpoint(tmp_path / "r").step == stop_at
    trained(tmp_path / "r", *small, *LONG)
    assert_same_run(tmp_path / "r", uninterrupted)


def test_stop_in_validation(
    tmp_path: Path, small: list[str], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.loop

    stop, batches = StopRequest(), training.loop.valid_batches

    def interrupted(*args: object, **kwargs: object):
        for batch in batches(*args, **kwargs):  # type: ignore[arg-type]
            yield batch
            stop.signum = signal.SIGTERM

    monkeypatch.setattr(training.loop, "valid_batches", interrupted)
    trained(tmp_path / "r", *small, *LONG, stop=stop)
    assert open_checkpoint(tmp_path / "r").step == 4 and not any("valid/loss" in r for r in metrics(tmp_path / "r"))
    monkeypatch.undo()
    trained(tmp_path / "r", *small, *LONG)
    assert_same_run(tmp_path / "r", uninterrupted)


def test_a_damaged_checkpoint_costs_its_steps_only(tmp_path: Path, small: list[str], uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "r")
    for step in (12, 9):
        os.truncate(tmp_path / "r" / "checkpoints" / f"step-{step:08d}" / "__0_0.distcp", 1000)
    trained(tmp_path / "r", *small, *LONG)
    assert_same_run(tmp_path / "r", uninterrupted)
    assert (tmp_path / "r" / "checkpoints" / "step-00000009.corrupt").exists()


def test_resume_after_a_signal(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=120", "checkpoint.every=20", "valid_every=50", "name=signalled"]
    trained(tmp_path / "whole", *settings)
    argv = ["train.py", *settings, "data.workers=2", f"hydra.run.dir={tmp_path / 'r'}", "parallel.threads=2"]
    for signum, code, n in ((signal.SIGHUP, 129, 1), (signal.SIGKILL, -9, 40)):
        command: Any = {"args": [sys.executable, *argv], "cwd": ROOT, "start_new_session": True}
        process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(read_records(tmp_path / "r" / METRICS)) < n:
            time.sleep(0.02)
        os.killpg(process.pid, signum)  # the loader's workers too, as Ctrl-C in a terminal
        printed = process.communicate(timeout=120)[1]
        assert process.returncode == code and n <= len(read_records(tmp_path / "r" / METRICS)) < 120
        assert printed.count("stopping after this step and saving") == (code > 0) and "Traceback" not in printed
    ran(*argv)
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_accept_changes(run_dir: Path, tmp_path: Path, small: list[str], caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    changed = [*small, "steps=14", "optimizer.weight_decay=0.5"]
    with pytest.raises(CheckpointError, match=r"optimizer.weight_decay \(0.01, now 0.5\), steps \(10, now 14\)"):
        trained(folder, *changed)
    assert trained(folder, *changed, "checkpoint.accept_changes=[steps,optimizer.weight_decay]") is not None
    assert open_checkpoint(folder).step == 14
    rates = [record["optim/lr"] for record in metrics(folder) if "train/loss" in record]
    assert f"rate is {rates[10]:.3g}; with the run's earlier settings it would be 0.0001" in caplog.text
    assert rates[10] > rates[9]
    caplog.clear()
    trained(folder, *changed)
    assert "earlier settings" not in caplog.text, "nothing changed"


def test_changed_data_is_refused(run_dir: Path, corpus_dir: Path, tmp_path: Path, small: list[str]) -> None:
    """Case 24."""
    folder = tmp_path / "r"
    shutil.copytree(run_dir, folder)
    shutil.copytree(corpus_dir, tmp_path / "tokens")
    for name in ("bin", "idx", "json"):
        file = f"code-00000.{name}"
        shutil.copyfile(corpus_dir / "valid" / file, tmp_path / "tokens" / "train" / file)
    with pytest.raises(CheckpointError, match="data.fingerprint"):
        trained(folder, *small, f"data.path={tmp_path / 'tokens'}")


def test_skipped_batches_are_counted_and_not_trained_on(tmp_path: Path, small: list[str]) -> None:
    trained(tmp_path / "r", *small, "skip_batches=[1,4-6]")
    progress = open_checkpoint(tmp_path / "r").state["progress"]
    assert (progress["step"], progress["updates"], progress["skipped_steps"], progress["samples"]) == (10, 6, 4, 40)
    steps = [record["step"] for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert steps == [2, 3, 7, 8, 9, 10]
    rates = [record["optim/lr"] for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert rates == sorted(rates, reverse=True), "the schedule follows the updates"


def test_steps_without_targets_are_pointed_out(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import training.loop

    step = training.loop.train_step

    def without_targets(run: Run, batches: Iterator[list[Batch]], *, skip: bool) -> None:
        batch = next(batches)
        for micro_batch in batch if run.state.step == 2 else ():
            micro_batch.labels_BT.fill_(IGNORED)
        step(run, iter([batch]), skip=skip)

    monkeypatch.setattr(training.loop, "train_step", without_targets)
    trained(tmp_path / "r", *small)
    assert [record.getMessage() for record in caplog.records if "no target token" in record.message] == [
        "step 3 had no target token, so its gradient was zero"
    ]


def test_ramp_starts_with_smaller_batches(tmp_path: Path, small: list[str]) -> None:
    trained(tmp_path / "r", *small, "ramp.start_tokens=64", "ramp.increment_tokens=64", "ramp.every_steps=4")
    tokens = [record["tokens"] for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert tokens == [64 * n for n in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)]


@pytest.mark.parametrize(
    "options",
    [["precision=bf16"], ["precision=fp16"], ["parallel.activation_checkpointing=full"], ["data.packing=internlm_one", "data.pack_len=64"],
     ["loss.reduction=micro_batch_mean", "optimizer.decay=all"], ["scheduler=wsd"], ["scheduler=constant", "optimizer.beta2_c=0.8"],
     ["model.embed_grad_scale=0.1", "model.tie_embeddings=true"], ["loss.label_smoothing=0.1"], ["data=random", "data.vocab_size=1000"]],
    ids=str,
)  # fmt: skip
def test_every_option_trains(tmp_path: Path, small: list[str], options: list[str]) -> None:
    kept = [o for o in small if not (options[0] == "data=random" and o.startswith(("data=", "data.path")))]
    valid_loss = trained(tmp_path / "r", *kept, "steps=3", *options)
    assert valid_loss is not None and 4 < valid_loss < 7.5
    assert metrics(tmp_path / "r")[-2]["train/nonfinite_steps"] == 0


def test_nonfinite_gradients_end_the_run_and_name_the_module(tmp_path: Path, small: list[str]) -> None:
    """Case 42."""
    with pytest.raises(TrainingError, match=r"3 steps in a row .* first in \S+ \((weight|forward|backward|gradient)\)"):
        diverges = ["optimizer.lr=1e30", "optimizer.max_nonfinite_steps=3", "steps=30", "checkpoint.every=1"]
        trained(tmp_path / "r", *small, *diverges)
    records = metrics(tmp_path / "r")
    assert records[-1]["train/nonfinite_steps"] >= 2 and records[-1]["train/grad_norm"] is None
    finite = max(r["step"] for r in records if r.get("train/grad_norm") is not None)
    assert open_checkpoint(tmp_path / "r").step == finite, "none after it"


def test_no_save_at_a_nonfinite_step(tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 42: what a run of steps without a finite gradient leaves behind pushes out nothing good."""
    sync = TrainState.sync

    def in_a_row(self: TrainState) -> int:
        new = sync(self)
        self.nonfinite_in_a_row = {4: 1, 5: 2, 10: 1}.get(self.step, 0)
        return new

    monkeypatch.setattr(TrainState, "sync", in_a_row)
    trained(tmp_path / "r", *small, "checkpoint.every=4", "checkpoint.keep=0")
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "r" / "checkpoints").glob("step-*"))
    assert steps == [6, 8, 10], "one such step at the end may be an overflow of fp16"


def test_a_checkpoint_that_is_not_finite_is_not_resumed(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 42: one of before it was checked at the save."""
    settings = [*small, "checkpoint.every=4"]

    def spoil(run: Run) -> None:
        if run.state.step == 10:
            run.checkpoints.optimizer.weights.shards["norm.weight"][3] = math.nan

    with monkeypatch.context() as unchecked:
        unchecked.setattr("training.resume.check_tensors", lambda *_: None)
        trained(tmp_path / "r", *settings, periodic=[Periodic(1, spoil)])
    trained(tmp_path / "r", *settings)
    assert "model.norm.weight on rank 0 is not finite; set aside as step-00000010.corrupt" in caplog.text
    trained(tmp_path / "whole", *settings)
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_an_older_checkpoint_lacks_what_came_later(tmp_path: Path, run_dir: Path, small: list[str]) -> None:
    """Case 25: settings that did not exist then have their defaults; a counter of newer code is refused."""
    shutil.copytree(run_dir, tmp_path / "r")
    folder = next((tmp_path / "r" / "checkpoints").glob("step-*"))

    def rewrite(change: Callable[[dict], object]) -> None:
        state, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("state", "manifest"))
        change(state)
        (folder / "state.json").write_text(json.dumps(state))
        raw = (folder / "state.json").read_bytes()
        manifest["files"]["state.json"] = {"size": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    rewrite(lambda state: (state["config"]["optimizer"].pop("eps"), state["progress"].pop("skipped_steps")))
    rewrite(lambda state: state.pop("scaler"))
    trained(tmp_path / "r", *small)
    rewrite(lambda state: state["progress"].update(wisdom=1))
    with pytest.raises(CheckpointError, match="unknown progress wisdom; use the version that wrote it"):
        trained(tmp_path / "r", *small)


@pytest.mark.slow
def test_torchrun_equals_the_plain_command(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=3", "name=r", "parallel=ddp", "parallel.threads=1", "parallel.nproc_per_node=2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, way in {"joined": torchrun, "started": []}.items():
        done = ran(*way, "train.py", *settings, f"hydra.run.dir={tmp_path / name}")
        assert done.stdout.count("step 3/3") == 1 and (tmp_path / name / "train.rank1.log").exists()
    assert_same_run(tmp_path / "joined", tmp_path / "started")


@pytest.mark.parametrize(
    ("override", "environment", "code", "key"),
    [
        ("seed=0", {"WORLD_SIZE": "2"}, 2, "MASTER_ADDR"),
        ("parallel.device=cuda", {"CUDA_VISIBLE_DEVICES": ""}, 1, "parallel.device"),
        ("model.attention=varlen", {}, 1, "model.attention"),
    ],
)
def test_impossible_run(
    tmp_path: Path, small: list[str], override: str, environment: dict, code: int, key: str
) -> None:
    """Cases 37 and 48."""
    argv = ["train.py", *small, "name=x", override, f"hydra.run.dir={tmp_path}"]
    assert key in ran(*argv, code=code, **environment).stderr
