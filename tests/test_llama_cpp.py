"""llama.cpp reads an export as it was trained: the same tokens, and the same text."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import generate
from conf.schema import GenerateConfig
from corpus.chat import TEMPLATES
from data.mixed_text import mixed_lines
from data.tokenizer import CHAT_TEMPLATE, SentencePieceTokenizer, sentencepiece_proto
from parallel.config import Device
from tests.conftest import exported
from training.checkpoint import Checkpoints, open_checkpoint
from training.config import CheckpointConfig

gguf = pytest.importorskip("gguf", reason="requirements-dev.txt is not installed")
client = pytest.importorskip("xllamacpp", reason="requirements-dev.txt is not installed")

TEXTS = [
    "春风", "今天天气", " 今天", "  a  b", "a\nb\n\n    c\t d", "龘靐 🦄 é", "def main(", "</s> is text too", "",
    *mixed_lines()[:200:7],
]  # fmt: skip


def convert(hf: Path, out: Path) -> None:
    """Convert an export by the keys that llama.cpp's convert_hf_to_gguf.py reads, with its defaults for missing ones."""
    about, settings = (json.loads((hf / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    heads, kv_heads = about["num_attention_heads"], about["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_vocab_size(about["vocab_size"])
    writer.add_context_length(about["max_position_embeddings"])
    writer.add_embedding_length(about["hidden_size"])
    writer.add_block_count(about["num_hidden_layers"])
    writer.add_feed_forward_length(about["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(about["rms_norm_eps"])
    writer.add_rope_freq_base(about["rope_theta"])
    writer.add_rope_dimension_count(about["head_dim"])
    model = SentencePieceTokenizer(hf / "tokenizer.model").model
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    ids = range(about["vocab_size"])
    tokens = [model.id_to_piece(i).encode() for i in ids]
    scores = [model.get_score(i) for i in ids]
    types = [next((kind for name, kind in kinds.items() if getattr(model, name)(i)), 1) for i in ids]
    for i, token in ((int(i), token) for i, token in settings.get("added_tokens_decoder", {}).items()):
        tokens[i], scores[i], types[i] = token["content"].encode(), -1000.0, 3 if token["special"] else 4
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    if "add_prefix_space" in settings:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    gguf.SpecialVocab(hf, n_vocab=len(tokens)).add_to_gguf(writer)  # as the converter calls it
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, about["num_hidden_layers"])
    for name, tensor in load_file(hf / "model.safetensors").items():
        for kind, n in (("q_proj", heads), ("k_proj", kv_heads)):
            if kind in name:  # its rotary pairs are neighbours
                tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def served(path: Path) -> Any:
    params = client.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(path), 512, 1, 1
    params.cache_type_k = params.cache_type_v = client.ggml_type.GGML_TYPE_F32  # the default rounds
    params.warmup, params.verbosity = False, -1
    return client.Server(params)


def ask(server: Any, path: str, **body: object) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    raw = json.dumps(body).encode() if body else None
    request = urllib.request.Request(server.listening_address + path, raw, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def run_with(run_dir: Path, folder: Path, kind: str) -> Path:
    """Write a run of the same weights with another tokenizer of as many pieces."""
    checkpoint, tokens = open_checkpoint(run_dir), folder / "tokenizer" / "tokenizer.model"
    tokens.parent.mkdir(parents=True)
    proto = sentencepiece_proto(run_dir / "tokenizer" / "tokenizer.model")
    if kind == "prefix and bos":
        proto.normalizer_spec.add_dummy_prefix = True
    if kind == "chat":
        last = [piece for piece in proto.pieces if len(piece.piece) > 1][-3:]  # no merge is of them
        for piece, name in zip(last, ("<eoh>", "<eoa>", "<mark>"), strict=True):
            piece.piece, piece.type = name, (4 if name == "<mark>" else 3)  # user-defined, control
        (folder / "tokenizer" / CHAT_TEMPLATE).write_text(TEMPLATES["internlm"])
    tokens.write_bytes(proto.SerializeToString())
    state = {**checkpoint.state, "data": {**checkpoint.state["data"], "add_bos": kind == "prefix and bos"}}
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.read("model.").items()}
    Checkpoints(folder, CheckpointConfig()).save(1, tensors, state)
    return folder


@pytest.mark.parametrize("kind", ["own", "prefix and bos", "chat"])
def test_llama_cpp_tokens_and_text(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    run = run_with(run_dir, tmp_path / "run", kind)
    with monkeypatch.context() as patch:
        patch.setattr("export.verify", lambda *_, **__: "by another client")  # which takes long
        convert(exported(run, tmp_path / "hf"), tmp_path / "model.gguf")
    server = served(tmp_path / "model.gguf")
    config = GenerateConfig(run=str(run), prompt="", device=Device.cpu, temperature=0.0, max_new_tokens=12)
    writer = generate.Writer(config)
    bos = [writer.tokenizer.bos_id] if writer.saved.add_bos else []
    for text in [*TEXTS, *(["a<mark>b <mark>"] if kind == "chat" else [])]:
        found = ask(server, "/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert found == [*bos, *writer.tokenizer.encode(text)], text
    for text in TEXTS[:5]:
        found = ask(server, "/completion", prompt=text, n_predict=12, temperature=0, cache_prompt=False)["content"]
        assert found == writer.write([(0, text, 0)])[0], text
    ends = ask(server, "/props")
    assert ends["eos_token"] == ("<eoa>" if kind == "chat" else "</s>")
    if kind == "chat":
        rendered = ask(server, "/apply-template", messages=[{"role": "user", "content": "hi"}])["prompt"]
        assert rendered == "<|User|>:hi<eoh>\n<|Bot|>:"
