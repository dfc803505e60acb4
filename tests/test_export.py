"""What is exported loads elsewhere as it was here, and what is not right is not exported."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from conf.schema import ExportConfig, stored_model
from corpus.config import DataError
from data.tokenizer import load_tokenizer, sentencepiece_proto
from model.config import ModelConfig, ModelError
from model.hf.llama import llama_config, read_hf, read_hf_config
from model.transformer import Transformer
from tests.conftest import ROOT, trained
from training.checkpoint import open_checkpoint
from training.config import CheckpointError, Dtype

TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "hf"
    done = subprocess.run(
        [sys.executable, "export.py", f"run={run_dir}", f"out={out}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no missing or unexpected keys, logits equal to" in done.stdout
    texts = int(done.stdout.split("decoding equal on ")[1].split(" texts")[0].replace(",", ""))
    assert texts >= 1000
    return out


def test_the_folder_holds_no_code_and_both_names_of_theta(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "README.md", "export.json",
    }  # fmt: skip
    about = json.loads((exported / "config.json").read_text())
    assert (
        about["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in about and about["attention_bias"] is True
    )
    assert about["vocab_size"] == 1000, "padding of the vocabulary is left out"
    assert about["rope_theta"] == about["rope_parameters"]["rope_theta"] == 10000.0


def test_a_second_export_is_the_first_and_another_is_not_overwritten(
    exported: Path, run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    export.export(run_dir, ExportConfig(run=str(run_dir), out=str(exported)))
    assert "is the export of" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"exists and is no export of .* in fp32"):
        export.export(run_dir, ExportConfig(run=str(run_dir), out=str(exported), dtype=Dtype.fp32))


def test_a_model_goes_out_and_in_without_a_changed_bit(run_dir: Path, tmp_path: Path) -> None:
    export.export(run_dir, ExportConfig(run=str(run_dir), out=str(tmp_path / "hf"), dtype=Dtype.fp32))
    export.bring_in(tmp_path / "hf", str(tmp_path / "back"))
    before, after = open_checkpoint(run_dir), open_checkpoint(tmp_path / "back")
    weights, again = before.read("model."), after.read("model.")
    assert weights.keys() == again.keys()
    assert all(torch.equal(tensor[: len(again[name])], again[name]) for name, tensor in weights.items())
    padded = {name for name, tensor in weights.items() if len(tensor) != len(again[name])}
    assert padded == {"embed.weight", "head.weight"}
    shape, returned = stored_model(before.state["config"]), stored_model(after.state["config"])
    assert (shape.vocab_size, returned.vocab_size) == (1024, 1000), "the tokenizer's: the rest was padding"
    assert (shape.rope_theta, shape.max_seq_len) == (returned.rope_theta, returned.max_seq_len)
    export.export(
        tmp_path / "back",
        ExportConfig(run=str(tmp_path / "back"), out=str(tmp_path / "hf2"), dtype=Dtype.fp32),
    )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "hf2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_a_model_that_computes_something_else_are_refused(
    tmp_path: Path, small: list[str], exported: Path
) -> None:
    changed = ["model.norm_eps=1e-6", "model.n_heads=8", "model.n_kv_heads=4"]
    with pytest.raises(
        ModelError,
        match=r"is of another model than .*; give model\.n_heads=4 model\.n_kv_heads=2 model\.norm_eps=1e-05$",
    ):
        trained(tmp_path / "r", *small, *changed, f"init_from={exported}")


def test_a_model_of_tokens_alone_is_exported_without_a_tokenizer(
    tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture
) -> None:
    random = ["data=random", "data.seq_len=32", "data.vocab_size=1000", "steps=1"]
    trained(tmp_path / "r", *(o for o in small if not o.startswith("data")), *random, "data.micro_batch_size=2")
    export.export(tmp_path / "r", ExportConfig(run=str(tmp_path / "r"), out=str(tmp_path / "hf")))
    assert "logits equal to" in (told := capsys.readouterr().out) and told.splitlines()[0].endswith(", no tokenizer")


def with_a_blank_first(tokenizer: Path) -> bytes:
    proto = sentencepiece_proto(tokenizer)
    proto.normalizer_spec.add_dummy_prefix = True
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "tokenizer.txt",
            b"",
            r"hf holds no tokenizer, neither tokenizer.model nor tokenizer.json: generate.py will not",
        ),
        ("tokenizer.json", b"{", r"tokenizer.json is not a tokenizer.json: "),
        ("tokenizer.model", b"{", r"tokenizer.model is not a SentencePiece model: "),
        (
            "tokenizer.model",
            None,
            r"tokenizer.model is not a BPE model with .* export.py can make no equal tokenizer.json",
        ),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_told_before_the_weights_are_read(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    name: str, content: bytes | None, told: str,
) -> None:  # fmt: skip
    folder = shutil.copytree(exported, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / name).write_bytes(with_a_blank_first(exported / name) if content is None else content)

    def no_more(folder: Path) -> None:
        raise RuntimeError("weights are read")

    with monkeypatch.context() as patch:
        patch.setattr("model.hf.llama.read_hf", no_more)
        with pytest.raises((DataError, RuntimeError)) as raised:
            export.bring_in(folder, str(tmp_path / "run"))
    assert re.search(told, capsys.readouterr().out + str(raised.value)) and not (tmp_path / "run").exists()
    if content is None:
        export.bring_in(folder, str(tmp_path / "run"))
        monkeypatch.setattr(export, "write_weights", no_more)
        with pytest.raises(DataError, match=told):
            export.export(tmp_path / "run", ExportConfig(run=str(tmp_path / "run"), out=str(tmp_path / "out")))


def test_a_folder_whose_tokenizer_model_puts_a_blank_first_goes_out_again(exported: Path, tmp_path: Path) -> None:
    llama = shutil.copytree(exported, tmp_path / "llama")
    (llama / "tokenizer.model").write_bytes(with_a_blank_first(llama / "tokenizer.model"))
    fast = json.loads((llama / "tokenizer.json").read_text())  # as Llama 2's
    fast["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, fast["normalizer"]]}
    fast["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (llama / "tokenizer.json").write_text(json.dumps(fast))
    export.bring_in(llama, str(tmp_path / "run"))
    export.export(tmp_path / "run", ExportConfig(run=str(tmp_path / "run"), out=str(tmp_path / "hf")))
    assert load_tokenizer(tmp_path / "hf").encode("x y") == load_tokenizer(llama / "tokenizer.json").encode("x y")


def test_training_starts_from_a_hugging_face_folder(
    run_dir: Path, tmp_path: Path, small: list[str], exported: Path
) -> None:
    trained(tmp_path / "r", *small, "steps=1", "optimizer.lr=1e-12", f"init_from={exported}")
    with pytest.raises(CheckpointError, match=r"32\) there and \(.*64\) here; pass the model= that"):
        trained(tmp_path / "other", *small, f"init_from={exported}", "model.d_model=64")
    weights = open_checkpoint(tmp_path / "r").read("model.")
    for name, tensor in open_checkpoint(run_dir).read("model.").items():
        rows = 1000 if f"model.{name}" in export.VOCABULARY_WEIGHTS else len(tensor)
        torch.testing.assert_close(weights[name][:rows], tensor[:rows].bfloat16().float(), rtol=0, atol=1e-7)
        if rows == 1000:
            mean = tensor[:rows].bfloat16().float().mean(dim=0)
            torch.testing.assert_close(weights[name][rows:], mean.expand(24, -1), rtol=0, atol=1e-7)


def test_of_a_model_that_was_brought_in_no_more_than_the_model_is_taken(
    exported: Path, tmp_path: Path, small: list[str]
) -> None:
    export.bring_in(exported, str(tmp_path / "in"))
    for origin, words in ((tmp_path / "in", "was brought in and"), (exported, "is a Hugging Face folder and")):
        with pytest.raises(CheckpointError, match=rf"init_content \(model, scheduler\): .* {words} holds a model only"):
            trained(
                tmp_path / "r", *small, "model.vocab_size=1000", f"init_from={origin}", "init_content=[model,scheduler]"
            )


def damage(folder: Path, what: str) -> None:
    weights = load_file(folder / "model.safetensors")
    match what:
        case "weight":
            weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.gate_proj.weight"] = (
                weights["model.layers.0.mlp.gate_proj.weight"].clone(), weights["model.layers.0.mlp.up_proj.weight"].clone(),
            )  # fmt: skip
        case "missing":
            del weights["model.layers.1.self_attn.o_proj.bias"]
        case "bias":
            about = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**about, "attention_bias": False}))
        case "tokenizer":
            text = (folder / "tokenizer.json").read_text()
            (folder / "tokenizer.json").write_text(
                text.replace('"normalizer":', '"x":', 1) if '"normalizer":' in text else text
            )
            fast = json.loads((folder / "tokenizer.json").read_text())
            fast.pop("x", None)
            (folder / "tokenizer.json").write_text(json.dumps({**fast, "normalizer": None}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("missing", "wrong keys.*missing_keys"),
        ("bias", "wrong keys.*unexpected_keys"),
        ("weight", "logits differ by"),
        ("tokenizer", "tokenizer differs on"),
    ],
)
def test_a_wrong_export_is_not_kept(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, sentence: str
) -> None:
    reference = read_hf

    def read_before_damage(folder: Path) -> tuple[ModelConfig, dict]:
        result = reference(folder)
        damage(folder, what)
        return result

    monkeypatch.setattr("model.hf.llama.read_hf", read_before_damage)
    with pytest.raises(ModelError, match=sentence):
        export.export(run_dir, ExportConfig(run=str(run_dir), out=str(tmp_path / "hf")))
    assert not list(tmp_path.iterdir())


def test_a_value_outside_fp16_is_named(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.checkpoint import Checkpoint

    original = Checkpoint.read_names

    def with_large(self: Checkpoint, names: list[str]) -> dict:
        found = original(self, names)
        found["model.norm.weight"][0] = 70000.0
        return found

    monkeypatch.setattr(Checkpoint, "read_names", with_large)
    with pytest.raises(ModelError, match=r"model.norm.weight holds values outside dtype \(fp16\)"):
        export.export(run_dir, ExportConfig(run=str(run_dir), out=str(tmp_path / "hf"), dtype=Dtype.fp16))


SHAPE = ModelConfig(
    name="x",
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    max_seq_len=32,
    rope_theta=1e6,
)


def test_internlm2s_fused_weights_come_apart_as_they_were(tmp_path: Path) -> None:
    model = Transformer(SHAPE)
    model.init_weights(0)
    theirs = {}
    for name, tensor in model.state_dict().items():
        block = name.split(".")[1] if name.startswith("blocks") else ""
        stem = f"model.layers.{block}"
        names = {
            "embed.weight": "model.tok_embeddings.weight", "norm.weight": "model.norm.weight", "head.weight": "output.weight",
            f"blocks.{block}.attention_norm.weight": f"{stem}.attention_norm.weight",
            f"blocks.{block}.mlp_norm.weight": f"{stem}.ffn_norm.weight",
            f"blocks.{block}.attention.wo.weight": f"{stem}.attention.wo.weight",
            f"blocks.{block}.mlp.w_gate.weight": f"{stem}.feed_forward.w1.weight",
            f"blocks.{block}.mlp.w_up.weight": f"{stem}.feed_forward.w3.weight",
            f"blocks.{block}.mlp.w_down.weight": f"{stem}.feed_forward.w2.weight",
        }  # fmt: skip
        if name in names:
            theirs[names[name]] = tensor.clone()
    for i in range(2):
        q, k, v = (model.get_parameter(f"blocks.{i}.attention.{w}.weight").detach() for w in ("wq", "wk", "wv"))
        heads = []
        for group in range(2):  # per key head: its two query heads, its key, its value
            heads += [
                q[16 * group : 16 * group + 16],
                k[8 * group : 8 * group + 8],
                v[8 * group : 8 * group + 8],
            ]
        theirs[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(heads)
    save_file(theirs, tmp_path / "model.safetensors")
    about = llama_config(SHAPE, bos_id=1, eos_id=2, pad_id=None, dtype="float32")
    about = {**about, "architectures": ["InternLM2ForCausalLM"], "bias": False, "attention_bias": None}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    config, weights = read_hf(tmp_path)
    assert (config.n_kv_heads, config.attention_bias, config.rope_theta) == (2, False, 1e6)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures \(GPT2LMHeadModel\) is not one that can be read",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
            r"rope_scaling \(dynamic\)",
        ),
        ({"mlp_bias": True}, r"mlp_bias \(True\)"),
        ({"hidden_act": "gelu"}, r"hidden_act \(gelu\)"),
        ({"head_dim": 16}, r"head_dim \(16\) is not what this model computes, which is 8"),
        ({"sliding_window": 4096}, r"sliding_window \(4096\)"),
    ],
)
def test_what_would_give_other_logits_is_refused(change: dict, sentence: str) -> None:
    about = {**llama_config(SHAPE, bos_id=1, eos_id=2, pad_id=None, dtype="float32"), **change}
    with pytest.raises(ModelError, match=sentence):
        read_hf_config(about, Path("x"))


def test_internlm1_is_a_llama_with_biases() -> None:
    about = llama_config(SHAPE, bos_id=1, eos_id=2, pad_id=None, dtype="float32")
    del about["attention_bias"]
    about |= {"architectures": ["InternLMForCausalLM"], "bias": True}
    assert read_hf_config(about, Path("x")).attention_bias


WRITE = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
new = model.generate(**inputs, do_sample=False, max_new_tokens=8)
logits = model(new).logits
print(json.dumps([transformers.__version__, tokenizer.decode(new[0]), logits.flatten().tolist()]))
"""


@pytest.mark.skipif(not TRANSFORMERS_4.is_dir(), reason=f"make test puts transformers 4.57 into {TRANSFORMERS_4}")
def test_transformers_4_verifies_an_export_and_computes_what_5_does(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = [sys.executable, "-P", "-c", WRITE, str(tmp_path / "hf")]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TRANSFORMERS_4))
        export.export(run_dir, ExportConfig(run=str(run_dir), out=str(tmp_path / "hf")))
        assert "verified with transformers 4.57." in capsys.readouterr().out
        old = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    new = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    (old_version, old_text, old_logits), (new_version, new_text, new_logits) = (
        json.loads(process.communicate()[0].splitlines()[-1]) for process in (old, new)
    )
    assert old_version.startswith("4.57.") and new_version.startswith("5.")
    assert old_text == new_text and old_text.startswith("def main(")
    torch.testing.assert_close(torch.tensor(old_logits), torch.tensor(new_logits), rtol=0, atol=1e-5)
