"""generate.py and training.load: from a run, a checkpoint and a Hugging Face folder."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import generate
from conf.schema import GenerateConfig
from corpus.chat import ChatEncoder
from data.tokenizer import load_tokenizer
from model.config import ModelError
from parallel.config import Device
from tests.conftest import ran
from tests.corpus.test_chat import INST
from training.checkpoint import open_checkpoint
from training.load import load, open_saved

PROMPT = "def main("


def texts(config: GenerateConfig, prompts: list[str], shown: list[str] | None = None) -> list[str]:
    jobs = [(number, prompt, sample) for number, prompt in enumerate(prompts) for sample in range(config.samples)]
    return generate.Writer(config).write(jobs, [].append if shown is None else shown.append)


def settings(run_dir: Path, **changes: object) -> GenerateConfig:
    own = {"run": str(run_dir), "prompt": PROMPT, "max_new_tokens": 24, "device": Device.cpu}
    return GenerateConfig(**{**own, **changes})  # type: ignore[arg-type]


def test_load_opens_a_run_a_checkpoint_and_an_export(run_dir: Path, hf_dir: Path, tmp_path: Path) -> None:
    weights = open_checkpoint(run_dir).read("model.")
    for path in (run_dir, open_checkpoint(run_dir).path, hf_dir):
        model, tokenizer = load(path, device="cpu")
        assert model.config.d_model == 32 and not model.training
        for name, param in model.named_parameters():
            assert param.dtype == torch.float32 and torch.equal(param, weights[name][: len(param)])
        assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT
    half = load(str(run_dir), device="cpu", dtype=torch.bfloat16)[0]
    assert half.get_parameter("embed.weight").dtype == torch.bfloat16
    bare = shutil.copytree(hf_dir, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*"))
    for opening in (load, lambda path: generate.Writer(settings(run_dir, run=None, hf=str(path)))):
        with pytest.raises(ModelError, match="no tokenizer"):
            opening(bare)


def test_command_streams_the_prompt_and_its_continuation(run_dir: Path) -> None:
    done = ran("generate.py", f"run={run_dir}", f'prompt="{PROMPT}"', "max_new_tokens=24", "device=cpu")
    assert done.stdout == PROMPT + texts(settings(run_dir), [PROMPT])[0] + "\n"


def test_text_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        generate.show("\x1b[2J\n")
    assert capsys.readouterr().out == "\x1b[2J\n\\x1b[2J\n"


def test_export_writes_the_same_text(run_dir: Path, hf_dir: Path) -> None:
    for changes in ({"temperature": 0.0}, {"seed": 3}):
        from_hf = settings(run_dir, run=None, hf=str(hf_dir), **changes)
        assert texts(from_hf, [PROMPT]) == texts(settings(run_dir, **changes), [PROMPT])


def test_stop_tokens_of_an_export(hf_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_dir, tmp_path / "hf")
    for named, ends in ((7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2}), ([*range(1000)], {*range(1000)})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert open_saved(folder).stop_ids == ends
    assert texts(settings(folder, run=None, hf=str(folder)), [PROMPT]) == [""]


def test_samples_do_not_depend_on_the_batch(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["import os", "The\u2028value", "x = 1"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    file = {"prompt": None, "prompts": str(tmp_path / "prompts.txt")}
    outputs = []
    for size in (1, 4):
        generate.main(settings(run_dir, **file, samples=2, max_new_tokens=8, batch_size=size))
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
    [({}, "word " * 100, r"prompt \(word "), ({"device": Device.cuda}, "x", r"device \(cuda\)")],
)
def test_unusable_settings(
    run_dir: Path, changes: dict, prompt: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelError, match=named):
        texts(settings(run_dir, **changes), [prompt])


@pytest.mark.parametrize("key", ["prompt", "prompts"])
def test_prompts_of_file_and_stdin(run_dir: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, odd = tmp_path / "prompts.txt", "\u2028 \f\u0085\r\v "
    file, stdin = (settings(run_dir, **{"prompt": None, key: name}) for name in (str(path), "-"))
    content = b"\xef\xbb\xbf" + "\r\n \r\n".join([f"a{odd}b", f"{odd}c ", "\ufeffd"]).encode() + b"\n"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    lines = [f"a{odd}b", f"{odd}c ", "d"]
    assert generate.read_prompts(stdin) == (lines if key == "prompts" else ["\n \n".join(lines)])
    assert generate.read_prompts(file) == (lines if key == "prompts" else [str(path)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(ModelError, match=rf"{key} \(-\) has no prompt"):
        generate.read_prompts(stdin)
    for unusable in (None, b"\n", "naïve".encode("latin-1")) if key == "prompts" else ():
        path.unlink() if unusable is None else path.write_bytes(unusable)
        with pytest.raises(ModelError, match=r"prompts \(.*prompts\.txt\)"):
            generate.read_prompts(file)


@pytest.fixture
def chat_dir(run_dir: Path, tmp_path: Path) -> Path:
    """A run with a chat template whose answers end with the eos token."""
    folder = shutil.copytree(run_dir, tmp_path / "chat")
    (folder / "tokenizer" / "chat_template.jinja").write_text(INST)
    return folder


def test_chat_prompts_a_run_as_it_was_trained(chat_dir: Path, run_dir: Path) -> None:
    config = settings(chat_dir, prompt="Hi </s>", chat=True)
    writer = generate.Writer(config)
    tokenizer = writer.tokenizer
    assert tokenizer.eos_id is not None
    history = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    asked = [*history, {"role": "user", "content": "Hi </s>"}]
    ids, mask = ChatEncoder(INST, tokenizer).encode([*asked, {"role": "assistant", "content": "yes"}])
    answer = len(tokenizer.encode("yes")) + 1
    found = writer.prompt_ids("Hi </s>", history)
    assert found == ids[:-answer].tolist() and mask[-answer:].all() and found.count(tokenizer.eos_id) == 1
    writer.saved = replace(writer.saved, add_bos=True)
    assert writer.prompt_ids("Hi </s>", history) == found, "the template writes the bos token already"
    assert texts(config, ["Hi </s>"]) != texts(replace(config, chat=False), ["Hi </s>"])
    with pytest.raises(ModelError, match=r"chat \(true\): the chat template leaves out the role of system"):
        texts(replace(config, system="Be brief."), ["x"])
    with pytest.raises(ModelError, match=r"chat \(true\): .* has no chat template"):
        generate.Writer(settings(run_dir, chat=True))


def test_conversation(chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(chat_dir, prompt=None, chat=True, temperature=0.0, max_new_tokens=1)
    asked, first = list[tuple[str, int]](), texts(config, ["a\nb"])[0]
    writer, write = generate.Writer(config), generate.Writer.write

    def noted(jobs: list[generate.Job], show: Any, history: list[dict[str, str]]) -> list[str]:
        asked.append((jobs[0][1], len(history)))
        return write(writer, jobs, show, history)

    monkeypatch.setattr(writer, "write", noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\\\nb\n\nc\\d\nz"))
    writer.converse()
    assert asked == [("a\nb", 0), ("c\\d", 2), ("z", 4)]
    assert capsys.readouterr().out.startswith(first + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c d\n" * 9))
    with pytest.raises(ModelError, match="the conversation has"):
        writer.converse()


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
def test_unusable_numbers(run_dir: Path, changes: dict, named: str) -> None:
    problems = list(settings(run_dir, **changes).problems())
    assert len(problems) == 1 and problems[0].startswith(named)


def test_extreme_numbers(run_dir: Path) -> None:
    for changes in ({"temperature": 1e-4}, {"temperature": 1e4}, {"repetition_penalty": 1e4}):
        config = settings(run_dir, seed=2**63 - 1, max_new_tokens=2, **changes)
        assert not list(config.problems()) and len(texts(config, [PROMPT, "x"])) == 2
