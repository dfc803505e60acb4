"""Exports load in transformers as they were here; wrong ones are not kept; imports come back unchanged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from conf.schema import ExportConfig, GenerateConfig, stored_model
from corpus.config import DataError
from data.tokenizer import load_tokenizer, sentencepiece_proto
from model.config import ModelConfig, ModelError
from model.hf.families import Llama, read_config, read_weights
from model.transformer import Transformer
from tests.conftest import exported, ran, trained
from training.checkpoint import open_checkpoint
from training.config import CheckpointError, Dtype
from training.load import open_saved
from training.preflight import preflight_problems

TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"


def import_hf(folder: Path, out: Path) -> None:
    export.import_model(ExportConfig(from_hf=str(folder), out=str(out)))


@pytest.fixture(scope="module")
def hf_bf16(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "hf"
    done = ran("export.py", f"run={run_dir}", f"out={out}", "dtype=bf16")
    assert "no missing or unexpected keys, logits equal to" in done.stdout and "(bf16; dtype=fp32 " in done.stdout
    texts = int(done.stdout.split("decoding equal on ")[1].split(" texts")[0].replace(",", ""))
    assert texts >= 1000
    return out


def test_files_of_an_export_which_is_made_once(hf_bf16: Path, run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    names = {path.name for path in hf_bf16.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "special_tokens_map.json", "README.md", "export.json",
    }  # fmt: skip
    about = json.loads((hf_bf16 / "config.json").read_text())
    assert about["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in about and about["attention_bias"]
    assert about["vocab_size"] == 1000, "padding of the vocabulary is left out"
    assert about["rope_theta"] == about["rope_parameters"]["rope_theta"] == 10000.0
    exported(run_dir, hf_bf16, Dtype.bf16)
    assert "is the export of" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"hf exists"):
        exported(run_dir, hf_bf16)


def test_dtype_is_the_runs(run_dir: Path, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.verify", lambda *_, **__: "")
    trained(tmp_path / "auto", *small, "precision=auto", "steps=1")
    import_hf(exported(run_dir, tmp_path / "hf", Dtype.auto), tmp_path / "in")
    exports = [
        tmp_path / "hf",
        *(exported(tmp_path / run, tmp_path / f"{run}_hf", Dtype.auto) for run in ("auto", "in")),
    ]
    dtypes = [json.loads((out / "config.json").read_text())["dtype"] for out in exports]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]


def test_export_and_import_change_no_bit(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 50_000)
    monkeypatch.setattr("export.verify", lambda *_, **__: "")
    assert len(list(exported(run_dir, tmp_path / "hf").glob("model-*.safetensors"))) > 1
    import_hf(tmp_path / "hf", tmp_path / "back")
    before, after = open_checkpoint(run_dir), open_checkpoint(tmp_path / "back")
    weights, again = before.read("model."), after.read("model.")
    assert weights.keys() == again.keys()
    assert all(torch.equal(tensor[: len(again[name])], again[name]) for name, tensor in weights.items())
    padded = {name for name, tensor in weights.items() if len(tensor) != len(again[name])}
    assert padded == {"embed.weight", "head.weight"}
    shape, returned = stored_model(before.state["config"]), stored_model(after.state["config"])
    assert (shape.vocab_size, returned.vocab_size) == (1024, 1000), "the tokenizer's: the rest was padding"
    assert (shape.rope_theta, shape.max_seq_len) == (returned.rope_theta, returned.max_seq_len)
    first, second = (
        read_weights(folder) for folder in (tmp_path / "hf", exported(tmp_path / "back", tmp_path / "hf2"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_init_from_another_model_is_refused(tmp_path: Path, small: list[str], hf_bf16: Path) -> None:
    changed = ["model.d_model=64", "model.n_heads=8", "model.norm_eps=1e-6"]
    with pytest.raises(CheckpointError, match=r"model\.d_model=32 model\.n_heads=4 model\.norm_eps=1e-05"):
        trained(tmp_path / "r", *small, *changed, f"init_from={hf_bf16}")


def test_files_are_readable_as_the_umask_says(hf_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.verify", lambda *_, **__: "")
    before = os.umask(0o027)
    try:
        import_hf(hf_bf16, tmp_path / "run")
        exported(tmp_path / "run", tmp_path / "hf")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "state.json", "__0_0.distcp"} < set(modes)
    assert set(modes.values()) == {0o640}


def test_spellings_of_a_step(run_dir: Path, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "r"
    trained(run, *small, "steps=3", "checkpoint.every=1")
    assert {len(list(path.iterdir())) > 2 for path in (run / "checkpoints").glob("step-*")} == {True}
    weights = [open_checkpoint(run, step=step).read("model.")["norm.weight"] for step in (2, 3)]
    (tmp_path / "best").symlink_to(run / "checkpoints" / "step-00000002")
    (tmp_path / "same").symlink_to(run)
    second, third = "checkpoints/step-00000002", "checkpoints/step-00000003"
    for number, (inside, spelt, step) in enumerate(
        [
            (run, ".", 2), (run, f"{second}/", None), (run / "checkpoints", ".", 2), (run / second, ".", None),
            (run / third, "../step-00000002", None), (tmp_path, "best", None), (tmp_path, f"same/{second}", None),
            (run / third, ".", None), (tmp_path, "same", None),
        ]
    ):  # fmt: skip
        monkeypatch.chdir(inside)
        saved = open_saved(Path(spelt), step)
        assert torch.equal(saved.read()["norm.weight"], weights[number > 6]), spelt
        assert saved.tokenizer is not None, spelt
        config = GenerateConfig(run=spelt, step=step, prompt="x")
        assert [*config.problems(), *preflight_problems(config)] == []
    with pytest.raises(CheckpointError, match=r"step \(7\): .* choose from 1, 2, 3"):
        export.export(ExportConfig(run=str(run), step=7))
    assert "step (7)" in "".join(preflight_problems(ExportConfig(run=str(run), step=7)))
    assert [*ExportConfig(from_hf="x", step=7).problems()] == ["step (7) needs run"]


@pytest.mark.parametrize(("tied", "architecture"), [("false", "LlamaForCausalLM"), ("true", "GraniteForCausalLM")])
def test_multipliers_are_folded_unless_the_embedding_is_the_head(
    tied: str, architecture: str, tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture
) -> None:
    scaled = ["model.parametrization=completep", "model.base_width=16", "model.base_depth=1"]
    trained(tmp_path / "r", *small, "steps=2", *scaled, f"model.tie_embeddings={tied}")
    out = exported(tmp_path / "r", tmp_path / "hf")
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    assert "logits equal to" in capsys.readouterr().out


def test_export_without_a_tokenizer(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture) -> None:
    random = ["data=random", "data.seq_len=32", "data.vocab_size=1000", "steps=1"]
    trained(tmp_path / "r", *(o for o in small if not o.startswith("data")), *random, "data.micro_batch_size=2")
    assert (exported(tmp_path / "r", tmp_path / "hf") / "model.safetensors").exists()
    assert "no tokenizer" in capsys.readouterr().out


def with_a_blank(tokenizer: Path, *, last: bool = False) -> bytes:
    proto = sentencepiece_proto(tokenizer)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.trainer_spec.treat_whitespace_as_suffix = last  # which transformers cannot do
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.txt", b""), ("tokenizer.json", b"{"), ("tokenizer.model", b"{"), ("tokenizer.model", None)],
)
def test_tokenizer_of_an_import_is_checked_before_the_weights_are_read(
    hf_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    name: str, content: bytes | None,
) -> None:  # fmt: skip
    folder = shutil.copytree(hf_bf16, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / name).write_bytes(with_a_blank(hf_bf16 / name, last=True) if content is None else content)

    def no_weights(*_: object) -> None:
        raise RuntimeError("weights are read")

    with monkeypatch.context() as patch:
        patch.setattr("model.hf.families.read_weights", no_weights)
        with pytest.raises((DataError, RuntimeError)) as raised:
            import_hf(folder, tmp_path / "run")
    printed = capsys.readouterr().out
    named = "no tokenizer" if name == "x.txt" else name
    assert named in printed + str(raised.value) and isinstance(raised.value, RuntimeError) == bool(printed)
    assert not (tmp_path / "run").exists()
    if content is None:
        import_hf(folder, tmp_path / "run")
        assert (exported(tmp_path / "run", tmp_path / "out") / "model.safetensors").exists()
        assert "no equal tokenizer.json" in capsys.readouterr().out
        assert {p.name for p in (tmp_path / "out").glob("**/tokenizer*")} == {"tokenizer", name}


def test_import_with_a_dummy_prefix_is_exported_again(hf_bf16: Path, tmp_path: Path) -> None:
    llama = shutil.copytree(hf_bf16, tmp_path / "llama")
    (llama / "tokenizer.model").write_bytes(with_a_blank(llama / "tokenizer.model"))
    fast = json.loads((llama / "tokenizer.json").read_text())  # as Llama 2's
    fast["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, fast["normalizer"]]}
    fast["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (llama / "tokenizer.json").write_text(json.dumps(fast))
    import_hf(llama, tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").encode("x y") == load_tokenizer(llama / "tokenizer.json").encode("x y")


def test_init_content_of_an_import_is_the_model_alone(hf_bf16: Path, tmp_path: Path, small: list[str]) -> None:
    import_hf(hf_bf16, tmp_path / "in")
    content = ["model.vocab_size=1000", "init_content=[model,scheduler]"]
    for origin in (tmp_path / "in", hf_bf16):
        with pytest.raises(CheckpointError, match=rf"init_content \(model, scheduler\): .*{origin}"):
            trained(tmp_path / "r", *small, *content, f"init_from={origin}")


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
            fast = json.loads((folder / "tokenizer.json").read_text())
            (folder / "tokenizer.json").write_text(json.dumps({**fast, "normalizer": None}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "wrong"),
    [("missing", "missing_keys"), ("bias", "unexpected_keys"), ("weight", "logits"), ("tokenizer", "token ids differ")],
)
def test_wrong_export(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, wrong: str) -> None:
    def read_before_damage(folder: Path) -> dict:
        weights = read_weights(folder)
        damage(folder, what)
        return weights

    monkeypatch.setattr("training.load.read_weights", read_before_damage)
    with pytest.raises(ModelError, match=wrong):
        exported(run_dir, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


SHAPE = ModelConfig(
    name="x", vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32, rope_theta=1e6
)
ABOUT = Llama().write_config(SHAPE, dtype="float32", bos_token_id=1, eos_token_id=2)


def write_config(folder: Path, **changes: object) -> None:
    about = {key: value for key, value in {**ABOUT, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(about))


def test_internlm2_is_read_with_fused_weights_split(tmp_path: Path) -> None:
    model = Transformer(SHAPE)
    model.init_weights(0)
    names = {"embed": "model.tok_embeddings", "norm": "model.norm", "head": "output"}
    theirs = {}
    for i in range(2):
        block, stem = f"blocks.{i}", f"model.layers.{i}"
        names |= {
            f"{block}.attention_norm": f"{stem}.attention_norm", f"{block}.mlp_norm": f"{stem}.ffn_norm",
            f"{block}.attention.wo": f"{stem}.attention.wo", f"{block}.mlp.w_gate": f"{stem}.feed_forward.w1",
            f"{block}.mlp.w_up": f"{stem}.feed_forward.w3", f"{block}.mlp.w_down": f"{stem}.feed_forward.w2",
        }  # fmt: skip
        q, k, v = (model.get_parameter(f"{block}.attention.{w}.weight").detach() for w in ("wq", "wk", "wv"))
        # Per key head: its two query heads, its key, its value.
        heads = [x for g in range(2) for x in (q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8])]
        theirs[f"{stem}.attention.wqkv.weight"] = torch.cat(heads)
    theirs |= {f"{name}.weight": model.get_parameter(f"{ours}.weight").detach() for ours, name in names.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    write_config(tmp_path, architectures=["InternLM2ForCausalLM"], bias=False, attention_bias=None)
    config = read_config(tmp_path)[0]
    assert (config.n_kv_heads, config.attention_bias, config.rope_theta) == (2, False, 1e6)
    weights = read_weights(tmp_path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == weights.keys()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("architectures", {"architectures": ["GPT2LMHeadModel"]}),
        ("rope_scaling", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}),
        ("mlp_bias", {"mlp_bias": True}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("head_dim", {"head_dim": 16}),
        ("sliding_window", {"sliding_window": 4096}),
    ],
)
def test_config_that_would_give_other_logits_is_refused(tmp_path: Path, key: str, changes: dict) -> None:
    write_config(tmp_path, architectures=["InternLMForCausalLM"], attention_bias=None)
    assert read_config(tmp_path)[0].attention_bias, "InternLM-1 is a Llama with biases"
    write_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=key):
        read_config(tmp_path)


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
def test_transformers_4_computes_what_5_does(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-P", "-c", WRITE, str(tmp_path / "hf")]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TRANSFORMERS_4))
        assert "verified with transformers 4.57." in ran("export.py", f"run={run_dir}", f"out={tmp_path / 'hf'}").stdout
        old = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    new = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    (old_version, old_text, old_logits), (new_version, new_text, new_logits) = (
        json.loads(process.communicate()[0].splitlines()[-1]) for process in (old, new)
    )
    assert old_version.startswith("4.57.") and new_version.startswith("5.")
    assert old_text == new_text and old_text.startswith("def main(")
    torch.testing.assert_close(torch.tensor(old_logits), torch.tensor(new_logits), rtol=0, atol=1e-5)
