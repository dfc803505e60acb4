"""Where a run begins that begins with what another one has: its weights, and what else is asked for."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.schema import TrainConfig, to_config
from corpus.config import TokenizerConfig
from data.tokenizer import load_tokenizer
from tests.conftest import composed_cfg, metrics, ran, trained
from tests.corpora import RECORDS, lines, local, made
from training.checkpoint import open_checkpoint
from training.config import CheckpointError
from training.preflight import check_run, check_same_tokenizer


def test_init_content_model_and_all(run_dir: Path, tmp_path: Path, small: list[str]) -> None:
    source = open_checkpoint(run_dir)
    start = ["steps=1", "optimizer.lr=1e-12", f"init_from={run_dir}"]
    trained(tmp_path / "model", *small, *start)
    trained(tmp_path / "all", *small, *start, "steps=11", "init_content=[all]")
    weights, everything = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "all")
    for name, tensor in source.read("model.").items():
        torch.testing.assert_close(weights.read("model.")[name], tensor, rtol=0, atol=1e-8)
    assert (weights.state["progress"]["step"], weights.read("optimizer.")["norm.weight.step"]) == (1, 1)
    assert (everything.state["progress"]["step"], everything.read("optimizer.")["norm.weight.step"]) == (11, 11)
    with pytest.raises(CheckpointError, match="init_from"):
        trained(tmp_path / "none", *small, f"init_from={tmp_path / 'nothing'}")
    with pytest.raises(CheckpointError, match=r"model.d_model=32"):
        trained(tmp_path / "other", *small, f"init_from={run_dir}", "model.d_model=64")


def test_init_content_takes_one_thing(run_dir: Path, tmp_path: Path, small: list[str]) -> None:
    # So little is learnt, and moments are so long, that what a run began with can be read from its end.
    moments = ["optimizer.beta1=0.9999999", "optimizer.beta2=0.9999999"]
    still = [*small, "steps=11", "valid_tokens=64", "optimizer.lr=1e-12", *moments]
    trained(tmp_path / "none", *still, "skip_batches=[1-10]")  # 10 batches on, without an update
    source, fresh = open_checkpoint(run_dir), open_checkpoint(tmp_path / "none")
    first = {"none": metrics(tmp_path / "none")[0]}
    expected = (("optimizer", 1, 11, 21), ("scheduler", 1, 21, 11), ("sampler", 11, 1, 1))
    for content, step, updates, optimizer_step in expected:
        trained(tmp_path / content, *still, f"init_from={run_dir}", f"init_content=[{content}]")
        found, first[content] = open_checkpoint(tmp_path / content), metrics(tmp_path / content)[0]
        progress, tensors = found.state["progress"], found.read("")
        assert (first[content]["step"], progress["step"], progress["samples"]) == (step, 11, 44)
        assert (progress["updates"], tensors["optimizer.norm.weight.step"]) == (updates, optimizer_step)
        for name in tensors:
            if name.startswith("model.") or name.endswith(("exp_avg", "exp_avg_sq")):
                origin = source if content == "optimizer" and name.startswith("optimizer.") else fresh
                torch.testing.assert_close(tensors[name], origin.read_names([name])[name], rtol=1e-4, atol=1e-6)
    assert source.read("optimizer.norm.weight.exp_avg")[""].abs().max() > 1e-5, "moments differ from zeros"
    rates = {content: record["optim/lr"] / 1e-12 for content, record in first.items()}
    assert rates == pytest.approx({"none": 1, "optimizer": 1, "sampler": 1, "scheduler": 0.1182}, abs=1e-4)
    assert first["sampler"]["train/loss"] == pytest.approx(first["none"]["train/loss"], rel=1e-6), "the same batch"
    assert first["scheduler"]["train/loss"] == pytest.approx(first["optimizer"]["train/loss"], rel=1e-6)


def test_a_loss_scale_of_another_precision_is_not_taken(run_dir: Path, tmp_path: Path, small: list[str]) -> None:
    half = [*small, "precision=fp16", "steps=1", "init_content=[scheduler]"]
    trained(tmp_path / "fp16", *half, f"init_from={run_dir}", "precision.initial_scale=1024")
    trained(tmp_path / "again", *half, f"init_from={tmp_path / 'fp16'}")
    scales = [open_checkpoint(tmp_path / name).state["scaler"]["scale"] for name in ("fp16", "again")]
    assert scales == [1024, 1024]


def test_added_files_begin_a_new_epoch(tmp_path: Path, small: list[str], corpus_dir: Path) -> None:
    tokenizer, corpus = load_tokenizer(corpus_dir / "tokenizer"), local(tmp_path, "texts")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    made(corpus, tokenizer)
    settings = [*small, f"data.path={corpus.path}"]
    trained(tmp_path / "r", *settings, "steps=4")
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": f"came later {i} " * 9} for i in range(40)]))
    made(corpus, tokenizer, add=True)
    with pytest.raises(CheckpointError, match=r"accept_changes=\[data.added\]"):
        trained(tmp_path / "r", *settings, "steps=4")
    trained(tmp_path / "r", *settings, "steps=6", "checkpoint.accept_changes=[steps,data.added]")
    trained(tmp_path / "s", *settings, "steps=8", f"init_from={tmp_path / 'r'}", "init_content=[sampler]")
    for name, samples in (("r", 24), ("s", 32)):
        progress = open_checkpoint(tmp_path / name).state["progress"]
        assert (progress["first_sample"], progress["samples"]) == (16, samples)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> dict[str, str]:
    """Corpora with another tokenizer than the run's, and with the run's and a special token more."""
    root, model = tmp_path_factory.mktemp("others"), str(corpus_dir / "tokenizer")
    settings = {
        "small": TokenizerConfig(vocab_size=500),
        "shifted": TokenizerConfig(vocab_size=1000, add_special_tokens=["<call>"]),
        "grown": TokenizerConfig(model=model, vocab_size=0, add_special_tokens=["<call>"]),
    }
    for name, config in settings.items():
        data = local(corpus_dir.parent, "texts", path=str(root / name))
        made(data, config)
    return {name: str(root / name) for name in settings}


def test_other_tokenizer(run_dir: Path, hf_dir: Path, tmp_path: Path, small: list[str], others: dict[str, str]) -> None:
    """Case 24."""
    base: TrainConfig = to_config(composed_cfg(*small))
    fast = shutil.copytree(hf_dir, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer.model"))
    for origin in (run_dir, open_checkpoint(run_dir).path, fast):  # a tokenizer.json is compared too
        for name in ("own", *others):
            data = replace(base.data, path=others.get(name, base.data.path))
            config = replace(base, init_from=str(origin), data=data)
            if name in ("small", "shifted"):
                with pytest.raises(CheckpointError, match=r"prepare it with tokenizer.model=\S+, .*accept_changes="):
                    check_same_tokenizer(config)
                accepted = replace(config.checkpoint, accept_changes=["tokenizer.model"])
                check_same_tokenizer(replace(config, checkpoint=accepted))
                config = replace(config, init_content=["scheduler"])
            check_same_tokenizer(config)
    with pytest.raises(CheckpointError, match="has another tokenizer"):
        check_run(replace(base, init_from=str(run_dir), data=replace(base.data, path=others["small"])), tmp_path, "")
    with pytest.raises(CheckpointError, match="has another tokenizer"):
        trained(tmp_path / "refused", *small, f"data.path={others['small']}", f"init_from={run_dir}")


def test_vocabulary_grows(
    run_dir: Path, hf_dir: Path, tmp_path: Path, small: list[str], others: dict[str, str]
) -> None:
    old = open_checkpoint(run_dir).read("model.")
    for origin, size in ((run_dir, 1024), (hf_dir, 1000)):
        start = [*small, f"data.path={others['grown']}", f"init_from={origin}", "steps=1", "optimizer.lr=1e-12"]
        start.append(f"model.vocab_size={size + 128}")
        trained(tmp_path / origin.name, *start)
        new = open_checkpoint(tmp_path / origin.name).read("model.")
        for name, tensor in new.items():
            torch.testing.assert_close(tensor[:size], old[name][:size], rtol=0, atol=1e-6)
            if name in ("embed.weight", "head.weight"):
                mean = old[name][:size].mean(0).expand(128, -1)
                torch.testing.assert_close(tensor[size:], mean, rtol=0, atol=1e-6)
        with pytest.raises(CheckpointError, match="do not fit|has only a model"):
            trained(tmp_path / f"{origin.name}_all", *start, "init_content=[all]")
    with pytest.raises(CheckpointError, match=r"pass model.vocab_size=1024"):
        trained(tmp_path / "less", *small, f"init_from={run_dir}", "model.vocab_size=1000")


def test_resume_ignores_init_from(run_dir: Path, tmp_path: Path, small: list[str]) -> None:
    shutil.copytree(run_dir, tmp_path / "r")
    done = ran("train.py", *small, "name=r", "init_from=/nowhere", f"hydra.run.dir={tmp_path / 'r'}")
    assert "resumed from" in done.stdout and "init_from (/nowhere) is ignored" in done.stdout
