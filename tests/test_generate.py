"""generate.py and training.load: from a run, a checkpoint and a Hugging Face folder."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import export
import generate
from conf.schema import ExportConfig, GenerateConfig
from data.tokenizer import load_tokenizer
from model.config import ModelError
from tests.conftest import ROOT
from training.checkpoint import open_checkpoint
from training.config import CheckpointError, Dtype
from training.load import load, open_saved

PROMPT = "def main("


@pytest.fixture(scope="module")
def hf_dir(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "hf"
    export.export(run_dir, ExportConfig(run=str(run_dir), out=str(out), dtype=Dtype.fp32))
    return out


def texts(config: GenerateConfig, prompts: list[str], shown: list[str] | None = None) -> list[str]:
    jobs = [(number, prompt, sample) for number, prompt in enumerate(prompts) for sample in range(config.samples)]
    saved, model = generate.load_model(config)
    return generate.write(model, saved, config, jobs, [].append if shown is None else shown.append)


def settings(run_dir: Path, **changes: object) -> GenerateConfig:
    return GenerateConfig(**{"run": str(run_dir), "prompt": PROMPT, "max_new_tokens": 24, "device": "cpu", **changes})  # type: ignore[arg-type]


def command(*argv: str) -> str:
    done = subprocess.run([sys.executable, "generate.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_opens_runs_checkpoints_and_hugging_face_folders(run_dir: Path, hf_dir: Path, tmp_path: Path) -> None:
    weights = open_checkpoint(run_dir).read("model.")
    for path in (run_dir, open_checkpoint(run_dir).path, hf_dir):
        model, tokenizer = load(path, device="cpu")
        assert model.config.d_model == 32 and not model.training
        for name, param in model.named_parameters():
            assert param.dtype == torch.float32 and torch.equal(param, weights[name][: len(param)])
        assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT
    assert (
        load(str(run_dir), device="cpu", dtype=torch.bfloat16)[0].get_parameter("embed.weight").dtype == torch.bfloat16
    )
    bare = shutil.copytree(hf_dir, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*"))
    for opening in (load, lambda path: generate.load_model(settings(run_dir, run=None, hf=str(path)))):
        with pytest.raises(ModelError, match="no tokenizer"):
            opening(bare)


def test_command_streams_the_prompt_and_its_continuation(run_dir: Path) -> None:
    printed = command(f"run={run_dir}", f'prompt="{PROMPT}"', "max_new_tokens=24", "device=cpu")
    assert printed == PROMPT + texts(settings(run_dir), [PROMPT])[0] + "\n"


def test_exported_folder_writes_the_same_text(run_dir: Path, hf_dir: Path) -> None:
    for changes in ({"temperature": 0.0}, {"seed": 3}):
        from_hf = settings(run_dir, run=None, hf=str(hf_dir), **changes)
        assert texts(from_hf, [PROMPT]) == texts(settings(run_dir, **changes), [PROMPT])


@pytest.mark.parametrize(("named", "ends"), [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})])
def test_stop_tokens_of_a_hugging_face_folder(hf_dir: Path, tmp_path: Path, named: object, ends: set[int]) -> None:
    folder = shutil.copytree(hf_dir, tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert open_saved(folder).stop_ids == ends


def test_text_ends_with_any_stop_token(run_dir: Path) -> None:
    config = settings(run_dir)
    saved, model = generate.load_model(config)
    assert saved.tokenizer is not None
    every = replace(saved, stop_ids=set(range(saved.tokenizer.vocab_size)))
    jobs = [(0, PROMPT, 0)]
    assert generate.write(model, saved, config, jobs) != generate.write(model, every, config, jobs) == [""]


def test_samples_of_each_prompt_do_not_depend_on_the_batch(run_dir: Path, tmp_path: Path) -> None:
    prompts = ["import os", "The\u2028value", "x = 1"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(prompts).encode() + b"\r\n")
    same = (f"run={run_dir}", f"prompts={tmp_path / 'prompts.txt'}", "samples=2", "max_new_tokens=8", "device=cpu")
    outputs = [command(*same, f"batch_size={size}") for size in (1, 4)]
    assert outputs[0] == outputs[1] and outputs[0].count("--- prompt") == 6
    for i, prompt in enumerate(prompts):
        assert all(f"--- prompt {i + 1}, sample {j + 1}\n{prompt}" in outputs[0] for j in range(2))


def test_cache_changes_nothing_and_the_seed_does(run_dir: Path) -> None:
    one = texts(settings(run_dir, samples=3), [PROMPT])
    assert one == texts(settings(run_dir, samples=3, cache=False), [PROMPT])
    assert len(set(one)) == 3 and one != texts(settings(run_dir, samples=3, seed=1), [PROMPT])


def test_stop_string_ends_the_text_and_is_not_shown(run_dir: Path) -> None:
    free = texts(settings(run_dir), [PROMPT])[0]
    stop, shown = free[5:7], list[str]()
    stopped = texts(settings(run_dir, stop=[stop]), [PROMPT], shown)[0]
    assert stopped == free[: free.index(stop)] == "".join(shown)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_stream_never_shows_half_a_character(hf_dir: Path, kind: str) -> None:
    tokenizer = load_tokenizer(hf_dir / kind)
    text = " 🦄é今天天气 ᚠ今 y  z"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "some characters take several tokens"
    for prompt in ("x", "今", ""):
        stream = generate.TextStream(tokenizer, tokenizer.encode(prompt), [])
        shown = [stream.add(token) for token in ids]
        assert "".join(shown) + stream.finish() == text and not any("\ufffd" in piece for piece in shown)
    stopping = generate.TextStream(tokenizer, tokenizer.encode("x"), ["今天", "气"])
    assert "".join(map(stopping.add, ids)) == stopping.text == " 🦄é" and stopping.stopped
    unfinished = generate.TextStream(tokenizer, tokenizer.encode("x"), [])
    shown = "".join(map(unfinished.add, tokenizer.encode("é今")[:-1]))
    assert shown == "é" and unfinished.finish().strip("\ufffd") == ""


@pytest.mark.parametrize(
    ("changes", "prompt", "named"),
    [
        ({}, "word " * 100, r"prompt \(word "),
        ({"device": "cuda"}, "x", r"device \(cuda\)"),
        ({"run": None, "hf": "/nowhere"}, "x", "/nowhere"),
    ],
)
def test_unusable_settings_are_named(
    run_dir: Path, changes: dict, prompt: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises((ModelError, CheckpointError), match=named):
        texts(settings(run_dir, **changes), [prompt])


@pytest.mark.parametrize("content", [b"\n", None, "naïve".encode("latin-1")], ids=["empty", "missing", "latin"])
def test_unusable_file_of_prompts_is_named(run_dir: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"prompts \(.*prompts\.txt\)"):
        generate.read_prompts(settings(run_dir, prompt=None, prompts=str(path)))
