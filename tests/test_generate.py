"""generate.py and training.load: from a run, a checkpoint and a Hugging Face folder."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import export
import generate
from conf.cli import CONF
from conf.schema import ExportConfig, GenerateConfig, register
from conf.text import as_hydra_reads
from corpus.chat import ChatEncoder
from data.tokenizer import load_tokenizer
from model.config import ModelError
from parallel.config import Device
from tests.conftest import ROOT
from tests.corpus.test_chat import INST
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
    return GenerateConfig(
        **{"run": str(run_dir), "prompt": PROMPT, "max_new_tokens": 24, "device": Device.cpu, **changes}
    )  # type: ignore[arg-type]


def command(*argv: str) -> None:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("generate", overrides=[as_hydra_reads(argument, "generate", sweep=False) for argument in argv])
    generate.main.__wrapped__(cfg)  # type: ignore[attr-defined]


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
    argv = [f"run={run_dir}", f'prompt="{PROMPT}"', "max_new_tokens=24", "device=cpu"]
    done = subprocess.run([sys.executable, "generate.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == PROMPT + texts(settings(run_dir), [PROMPT])[0] + "\n", done.stderr


def test_exported_folder_writes_the_same_text(run_dir: Path, hf_dir: Path) -> None:
    for changes in ({"temperature": 0.0}, {"seed": 3}):
        from_hf = settings(run_dir, run=None, hf=str(hf_dir), **changes)
        assert texts(from_hf, [PROMPT]) == texts(settings(run_dir, **changes), [PROMPT])


def test_stop_tokens_of_a_hugging_face_folder_end_a_text(hf_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_dir, tmp_path / "hf")
    for named, ends in ((7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2}), ([*range(1000)], {*range(1000)})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert open_saved(folder).stop_ids == ends
    assert texts(settings(folder, run=None, hf=str(folder)), [PROMPT]) == [""]


def test_samples_of_each_prompt_do_not_depend_on_the_batch(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["import os", "The\u2028value", "x = 1"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    same = (f"run={run_dir}", f"prompts={tmp_path / 'prompts.txt'}", "samples=2", "max_new_tokens=8", "device=cpu")
    outputs = []
    for size in (1, 4):
        command(*same, f"batch_size={size}")
        outputs.append(capsys.readouterr().out)
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
        ({"device": Device.cuda}, "x", r"device \(cuda\)"),
        ({"run": None, "hf": "/nowhere"}, "x", "/nowhere"),
    ],
)
def test_unusable_settings_are_named(
    run_dir: Path, changes: dict, prompt: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises((ModelError, CheckpointError), match=named):
        texts(settings(run_dir, **changes), [prompt])


def test_file_of_prompts_has_the_lines_of_a_text(run_dir: Path, tmp_path: Path) -> None:
    config, odd = settings(run_dir, prompt=None, prompts=str(tmp_path / "p")), "\u2028 \f\u0085\r\v "
    lines = [f"a{odd}b", f"{odd}c ", "\ufeffd"]
    (tmp_path / "p").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(lines).encode() + b"\n")
    assert generate.read_prompts(config) == [f"a{odd}b", f"{odd}c ", "d"]


@pytest.mark.parametrize(("key", "expected"), [("prompt", ["a\n\n b\u0085\n"]), ("prompts", ["a", " b\u0085"])])
def test_prompts_come_from_standard_input(
    run_dir: Path, key: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\r\n\n b\u0085\n\n".encode())))
    assert generate.read_prompts(settings(run_dir, **{"prompt": None, key: "-"})) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(ModelError, match=rf"{key} \(-\) has no prompt"):
        generate.read_prompts(settings(run_dir, **{"prompt": None, key: "-"}))


@pytest.fixture
def chat_dir(run_dir: Path, tmp_path: Path) -> Path:
    """A run with a chat template whose answers end with the eos token."""
    folder = shutil.copytree(run_dir, tmp_path / "chat")
    (folder / "tokenizer" / "chat_template.jinja").write_text(INST)
    return folder


def test_chat_prompts_a_run_as_it_was_trained(chat_dir: Path, run_dir: Path) -> None:
    config = settings(chat_dir, prompt="Hi </s>", chat=True)
    saved, _ = generate.load_model(config)
    tokenizer = saved.tokenizer
    assert tokenizer is not None and tokenizer.eos_id is not None
    history = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    asked = [*history, {"role": "user", "content": "Hi </s>"}]
    ids, mask = ChatEncoder(INST, tokenizer).encode([*asked, {"role": "assistant", "content": "yes"}])
    answer = len(tokenizer.encode("yes")) + 1
    found = generate.prompt_ids(saved, tokenizer, config, "Hi </s>", history)
    assert found == ids[:-answer].tolist() and mask[-answer:].all() and found.count(tokenizer.eos_id) == 1
    with_bos = generate.prompt_ids(replace(saved, add_bos=True), tokenizer, config, "Hi </s>", history)
    assert with_bos == found, "the template writes the bos token already"
    assert texts(config, ["Hi </s>"]) != texts(replace(config, chat=False), ["Hi </s>"])
    with pytest.raises(ModelError, match=r"chat \(true\): the chat template leaves out the role of system"):
        texts(replace(config, system="Be brief."), ["x"])
    with pytest.raises(ModelError, match=r"chat \(true\): .* has no chat template"):
        generate.load_model(settings(run_dir, chat=True))


def test_conversation_goes_on_until_there_is_no_more_to_read(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(chat_dir, prompt=None, chat=True, temperature=0.0, max_new_tokens=1)
    saved, model = generate.load_model(config)
    asked, first = list[tuple[str, int]](), texts(config, ["a\nb"])[0]
    write = generate.write

    def noted(*args: Any) -> list[str]:
        asked.append((args[3][0][1], len(args[5])))
        return write(*args)

    monkeypatch.setattr(generate, "write", noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\\\nb\n\nc\\d\nz"))
    generate.converse(model, saved, config)
    assert asked == [("a\nb", 0), ("c\\d", 2), ("z", 4)]
    assert capsys.readouterr().out.startswith(first + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c d\n" * 9))
    with pytest.raises(ModelError, match="the conversation has"):
        generate.converse(model, saved, config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"temperature": value}, "temperature") for value in (float("nan"), float("inf"), -1.0, 1e-40)),
        *(({"repetition_penalty": value}, "repetition_penalty") for value in (float("nan"), float("inf"), 0.0)),
        *(({"top_p": value}, "top_p") for value in (float("nan"), 0.0)),
        *(({"seed": value}, "seed") for value in (-1, 2**63)),
        *(({key: -1}, key) for key in ("top_k", "max_new_tokens", "samples", "batch_size")),
        ({"top_k": 2**64}, "top_k"),
        ({"stop": ["a", ""]}, "stop"),
        ({"system": "Be brief."}, "system"),
        ({"prompts": "p", "chat": True}, "prompt and prompts"),
        ({"prompt": None}, "prompt and prompts"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(run_dir: Path, changes: dict, named: str) -> None:
    problems = list(settings(run_dir, **changes).problems())
    assert len(problems) == 1 and problems[0].startswith(named)


def test_extreme_numbers_are_no_error(run_dir: Path) -> None:
    for changes in ({"temperature": 1e-4}, {"temperature": 1e4}, {"repetition_penalty": 1e4}):
        config = settings(run_dir, seed=2**63 - 1, max_new_tokens=2, **changes)
        assert not list(config.problems()) and len(texts(config, [PROMPT, "x"])) == 2


def test_unusable_file_of_prompts_is_named(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for content in (None, b"\n", "naïve".encode("latin-1")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=r"prompts \(.*prompts\.txt\)"):
            generate.read_prompts(settings(run_dir, prompt=None, prompts=str(path)))
