"""generate.py from a run and from an exported folder."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import export
import generate
from conf.schema import ExportConfig, GenerateConfig
from data.tokenizer import load_tokenizer
from model.config import ModelError
from tests.conftest import ROOT
from training.config import Dtype

PROMPT = "def main("


def texts(config: GenerateConfig, prompts: list[str], stream: io.StringIO | None = None) -> list[str]:
    jobs = [(number, prompt, sample) for number, prompt in enumerate(prompts) for sample in range(config.samples)]
    return generate.write(generate.load(config), config, jobs, stream)


def settings(run_dir: Path, **changes: object) -> GenerateConfig:
    return GenerateConfig(**{"run": str(run_dir), "prompt": PROMPT, "max_new_tokens": 24, "device": "cpu", **changes})  # type: ignore[arg-type]


def test_the_command_streams_the_prompt_and_its_continuation(run_dir: Path) -> None:
    argv = [
        sys.executable,
        "generate.py",
        f"run={run_dir}",
        f'prompt="{PROMPT}"',
        "max_new_tokens=24",
        "device=cpu",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PROMPT + texts(settings(run_dir), [PROMPT])[0] + "\n"


def test_an_exported_folder_writes_the_same_text(run_dir: Path, tmp_path: Path) -> None:
    export.export(run_dir, ExportConfig(run=str(run_dir), out=str(tmp_path / "hf"), dtype=Dtype.fp32))
    for changes in ({"temperature": 0.0}, {"seed": 3}):
        from_hf = settings(run_dir, run=None, hf=str(tmp_path / "hf"), **changes)
        assert texts(from_hf, [PROMPT]) == texts(settings(run_dir, **changes), [PROMPT])


@pytest.mark.parametrize(("named", "ends"), [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})])
def test_a_hugging_face_folder_says_which_tokens_end_a_text(
    run_dir: Path, tmp_path: Path, named: object, ends: set[int]
) -> None:
    export.export(run_dir, ExportConfig(run=str(run_dir), out=str(tmp_path / "hf")))
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert generate.load(settings(run_dir, run=None, hf=str(tmp_path / "hf"))).stop_ids == ends


def test_a_text_ends_with_any_of_its_tokens(run_dir: Path) -> None:
    loaded, config = generate.load(settings(run_dir)), settings(run_dir)
    every = replace(loaded, stop_ids=set(range(loaded.tokenizer.vocab_size)))
    assert generate.write(loaded, config, [(0, PROMPT, 0)]) != generate.write(every, config, [(0, PROMPT, 0)]) == [""]


def test_a_prompts_file_gives_each_prompt_its_samples_whatever_the_batch(run_dir: Path, tmp_path: Path) -> None:
    prompts = ["import os", "The value", "x = 1"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    outputs = []
    for batch_size in (1, 4):
        argv = [
            f"run={run_dir}",
            f"prompts={tmp_path / 'prompts.txt'}",
            "samples=2",
            f"batch_size={batch_size}",
            "max_new_tokens=8",
            "device=cpu",
        ]
        done = subprocess.run([sys.executable, "generate.py", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and outputs[0].count("--- prompt") == 6
    assert all(
        f"--- prompt {i + 1}, sample {j + 1}\n{p}" in outputs[0] for i, p in enumerate(prompts) for j in range(2)
    )


def test_the_cache_changes_nothing_and_the_seed_does(run_dir: Path) -> None:
    one = texts(settings(run_dir, samples=3), [PROMPT])
    assert one == texts(settings(run_dir, samples=3, cache=False), [PROMPT])
    assert len(set(one)) == 3 and one != texts(settings(run_dir, samples=3, seed=1), [PROMPT])


def test_a_stop_string_ends_the_text_and_is_not_shown(run_dir: Path) -> None:
    free = texts(settings(run_dir), [PROMPT])[0]
    stop = free[5:7]
    stream = io.StringIO()
    stopped = texts(settings(run_dir, stop=[stop]), [PROMPT], stream)[0]
    assert stopped == free[: free.index(stop)]
    assert stream.getvalue() == PROMPT + stopped


def test_streaming_never_shows_half_a_character(run_dir: Path) -> None:
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    prompt, text = tokenizer.encode("x"), " 🦄é今ᚠ y"
    stream = io.StringIO()
    printer = generate.Printer(stream, "x", [])
    ids = tokenizer.encode(text)
    shown = []
    for n in range(1, len(ids) + 1):
        printer.show(generate.decode_after(tokenizer, prompt, ids[:n]))
        shown.append(stream.getvalue())
    printer.finish(generate.decode_after(tokenizer, prompt, ids))
    assert len(ids) > len(text), "some characters take several tokens"
    assert stream.getvalue() == "x" + text and not any("\ufffd" in part for part in shown)


@pytest.mark.parametrize(
    ("changes", "prompt", "sentence"),
    [
        ({}, "word " * 100, "and the model reads at most 64; shorten it"),
        ({"device": "cuda"}, "x", r"device \(cuda\): torch sees no CUDA device"),
        ({"run": None, "hf": "/nowhere"}, "x", "/nowhere/config.json is missing"),
    ],
)
def test_what_cannot_be_written_is_told(
    run_dir: Path, changes: dict, prompt: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelError, match=sentence):
        texts(settings(run_dir, **changes), [prompt])


def test_a_prompts_file_without_prompts_is_told(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    for name, sentence in (
        ("empty", "holds no prompt"),
        ("none", r"prompts \(.*none\) is no file; name one"),
        ("latin", r"prompts \(.*latin\) is not UTF-8 at byte 2; save it as UTF-8"),
    ):
        with pytest.raises(ModelError, match=sentence):
            generate.read_prompts(settings(run_dir, prompt=None, prompts=str(tmp_path / name)))
