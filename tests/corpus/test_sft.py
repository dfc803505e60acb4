"""Instructions and conversations, from a file to steps that train on the answers alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import export
import generate
from conf.schema import ExportConfig, GenerateConfig
from corpus.chat import MARKERS, TEMPLATES, ChatEncoder, chat_encoder
from corpus.config import OnBadRecord, Style, TokenizerConfig
from data.batches import IGNORED
from data.config import DataConfig
from data.dataset import open_corpus
from data.shards import LOSS_MASKED, Shard
from data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from model.config import ModelConfig
from parallel.config import Device
from tests.conftest import trained
from tests.corpora import exported, lines, local, made, n_documents, parquet
from tests.corpus.test_chat import TURNS, two
from training.checkpoint import open_checkpoint

ALPACA = [
    {"instruction": f"Add {i} and 1.", "input": "Briefly." if i % 2 else "", "output": f"It is {i + 1}."}
    for i in range(40)
]
SMALL = [
    "data.seq_len=32", "data.micro_batch_size=2", "data.workers=0", "global_batch_tokens=128", "precision=fp32", "parallel.device=cpu",
    "logger=none", "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=64",
    "model.vocab_size=1280", "model.max_seq_len=64", "steps=2", "valid_every=0",
]  # fmt: skip


def config(tmp_path: Path, style: Style, name: str, **changes: Any) -> DataConfig:
    changes = {"name": style.value, "path": str(tmp_path / "tokens"), "seq_len": 64, "packing": "best_fit"} | changes
    return local(tmp_path, name, style=style, **changes)


def answer_end(tokenizer: Tokenizer) -> int | None:
    encoder = chat_encoder(tokenizer)
    return encoder and encoder.answer_end()


def targets_of(data: DataConfig, vocab_size: int) -> tuple[str, list[str]]:
    """Return all that the packs hold, decoded, and the targets in it, in runs."""
    corpus = open_corpus(data, vocab_size=vocab_size)
    assert corpus.tokenizer is not None
    whole, runs = "", []
    for pack in range(corpus.train.n_packs):
        batch = corpus.train.batch(np.array([pack]))
        tokens, labels = batch.tokens_BT[0].numpy(), batch.labels_BT[0].numpy()
        whole += corpus.tokenizer.decode(tokens.tolist())
        targets = labels != IGNORED
        assert (labels[:-1][targets[:-1]] == tokens[1:][targets[:-1]]).all()
        parts = np.split(labels, np.flatnonzero(np.diff(targets)) + 1)
        runs += [corpus.tokenizer.decode(part.tolist()) for part in parts if part[0] != IGNORED]
    return whole, runs


def test_targets_of_instructions(tmp_path: Path, pieces: Tokenizer) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    data = config(tmp_path, Style.alpaca, "a.json")
    about = made(data, pieces)
    assert n_documents(about) == len(ALPACA)
    whole, runs = targets_of(data, 1204)
    asked = re.findall(r"<\|User\|>:Add (\d+) and 1\.(\nBriefly\.)?<eoh>\n<\|Bot\|>:It is (\d+)\.<eoa>\n", whole)
    assert len(asked) == about["splits"]["train"]["alpaca"]["documents"] > 20
    assert all(int(a) + 1 == int(b) and bool(brief) == bool(int(a) % 2) for a, brief, b in asked)
    assert sorted(runs) == sorted(f"It is {answer}.<eoa>\n" for _, _, answer in asked)


def test_conversations_of_many_fields(tmp_path: Path, pieces: Tokenizer) -> None:
    its = [{**TURNS[1], "name": "Ann"}, {**TURNS[2], "name": "Bo", "mood": {"calm": 1}}]
    records: list[dict[str, Any]] = [{"messages": its, "system": "Sing."}]
    records += [{"messages": turns} for turns in (TURNS, its[:1] + TURNS[2:3], its)]
    calls = {"messages": [TURNS[1], {**TURNS[2], "tool_calls": [{"name": "add"}]}]}
    (tmp_path / "a.parquet").write_bytes(parquet(records))  # a row has the fields of all, some without a value
    (tmp_path / "b.jsonl").write_bytes(lines([{"messages": its[1:], "system": "Hum.", "tools": []}, calls]))
    data = config(tmp_path, Style.chat, "*", on_bad_record=OnBadRecord.skip, valid_fraction=0.0, seq_len=256)
    about = made(data, pieces)
    assert about["left_out"]["count"] == 1
    assert about["left_out"]["places"][0].endswith("b.jsonl:2: the chat template leaves out tool_calls")
    whole, runs = targets_of(data, 1204)
    assert set(runs) == {"It is 42.<eoa>\n", "Naïve café.\n\n    indented<eoa>\n"} and len(runs) == 6
    assert "<|System|>:Sing.<eoh>\n<|User|>" in whole and "<|System|>:Hum.<eoh>\n<|Bot|>" in whole


def test_added_special_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": TURNS}] * 2))
    exported(tokenizer, tmp_path)
    names = ["<eoh>", "<eoa>", "</s>", "<eoa>"]
    for kind in ("tokenizer.model", "tokenizer.json"):
        path = str(tmp_path / kind.removeprefix("tokenizer."))
        data = config(tmp_path, Style.chat, "a.jsonl", valid_fraction=0.0, path=path)
        settings = TokenizerConfig(model=str(tmp_path / kind), vocab_size=0, add_special_tokens=names)
        made(data, settings)
        grown = load_tokenizer(Path(data.path) / "tokenizer")
        n = tokenizer.vocab_size
        assert grown.special_ids == {**tokenizer.special_ids, "<eoh>": n, "<eoa>": n + 1} and answer_end(grown) == n + 1
        assert grown.vocab_size == n + 2 and grown.encode("It is 42.") == tokenizer.encode("It is 42.")
        assert targets_of(data, n + 2)[1] != []


MODEL = ModelConfig(name="m", vocab_size=1280, d_model=64, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=64, max_seq_len=64)
BOTH_ENDS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<eoh>{% else %}"
    "{% generation %}{{ m.content }}<eoa>{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("template", "add_bos"), [(TEMPLATES["internlm"], True), (BOTH_ENDS, False)])
def test_exported_template(pieces: Tokenizer, tmp_path: Path, template: str, add_bos: bool) -> None:
    save_tokenizer(pieces, tmp_path / "run")
    (tmp_path / "run" / "chat_template.jinja").write_text(template)
    (tmp_path / "out").mkdir()
    own = load_tokenizer(tmp_path / "run")
    export.write_settings(tmp_path / "out", MODEL, own, torch.bfloat16, add_bos=add_bos)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(TURNS, return_dict=True)
    ids = ChatEncoder(template, own).encode(TURNS)[0].tolist()
    assert theirs["input_ids"] == [own.bos_id] * add_bos + ids
    stop = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(stop) == {own.eos_id, own.special_ids["<eoa>"]}


def test_tokenizer_trained_on_conversations(tmp_path: Path) -> None:
    words = " ".join(a + b for a in "abcdefghij" for b in "klmnopqrst")
    turns = [two(f"What is {i}? {words}", f"It is {i}. {words}") for i in range(9)]
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": its} for its in turns]))
    data = config(tmp_path, Style.chat, "a.jsonl", chat_template="chatml", valid_fraction=0.0)
    made(data, TokenizerConfig(vocab_size=360))
    own = load_tokenizer(Path(data.path) / "tokenizer")
    ids, _ = ChatEncoder(TEMPLATES["chatml"], own).encode(turns[0])
    assert answer_end(own) == own.special_ids["<|im_end|>"]
    assert all((ids == own.special_ids[name]).any() for name in MARKERS[TEMPLATES["chatml"]])
    assert own.special_ids["</s>"] not in own.encode("<eoa></s>") and own.decode(own.encode("<eoa>")) == "<eoa>"


def test_sft_experiment(tmp_path: Path, pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.verify", lambda *_, **__: "")
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    data = config(tmp_path, Style.alpaca, "a.json")
    made(data, pieces)
    trained(tmp_path / "base", "data=alpaca", f"data.path={data.path}", *SMALL, "steps=1")
    overrides = ["experiment=sft_7b", f"data.path={data.path}", f"init_from={tmp_path / 'base'}", *SMALL]
    assert trained(tmp_path / "sft", *overrides, "optimizer.lr=1e-9") is not None
    before, after = (open_checkpoint(tmp_path / name).read("model.") for name in ("base", "sft"))
    assert all(np.allclose(before[name].numpy(), after[name].numpy(), atol=1e-6) for name in before)
    export.export(ExportConfig(run=str(tmp_path / "sft")))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "sft" / "hf")
    text = theirs.apply_chat_template(TURNS[1:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|User|>:What is 12 + 30?<eoh>\n<|Bot|>:"
    generation = json.loads((tmp_path / "sft" / "hf" / "generation_config.json").read_text())
    ends = [2, pieces.special_ids["<eoa>"]]
    assert generation["eos_token_id"] == ends
    about = json.loads((tmp_path / "sft" / "hf" / "config.json").read_text())
    assert (about["eos_token_id"], theirs.eos_token, about["pad_token_id"]) == (ends[1], "<eoa>", 2)
    of_run = GenerateConfig(run=str(tmp_path / "sft"), prompt="x", device=Device.cpu)
    of_export = GenerateConfig(hf=str(tmp_path / "sft" / "hf"), prompt="x", device=Device.cpu)
    assert [generate.Writer(config).saved.stop_ids for config in (of_run, of_export)] == [set(ends)] * 2
    asked = theirs.apply_chat_template(two("Add 3 and 1.\nBriefly.", "It is 4."), return_dict=True)
    ids = [*asked["input_ids"], 2]
    shard = Shard(next((Path(data.path) / "train").glob("*.bin")).with_suffix(""))
    held = [(shard.document(i) & (LOSS_MASKED - 1)).tolist() for i in range(shard.n_documents)]
    assert ids in held, "what was trained on is what transformers makes of it"
    state = open_checkpoint(tmp_path / "sft").state
    assert state["config"]["init_from"] == str(tmp_path / "base") and state["config"]["data"]["style"] == "alpaca"
