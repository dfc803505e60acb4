"""Exports load in transformers as they were here; wrong ones are not kept; imports come back unchanged."""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

import export
from conf.schema import ExportConfig, GenerateConfig, stored_model
from corpus.config import DataError
from data.tokenizer import sentencepiece_proto
from model.config import ModelError
from model.hf.families import Llama, read_config, read_weights
from model.transformer import Transformer
from tests.conftest import exported, ran, trained
from tests.models import small_model
from training.checkpoint import open_checkpoint
from training.config import CheckpointError, Dtype
from training.load import open_saved
from training.preflight import preflight_problems

TRANSFORMERS_4 = Path(sys.prefix) / "transformers4"


def import_hf(folder: Path, out: Path) -> None:
    export.import_model(ExportConfig(from_hf=str(folder), out=str(out)))


def test_command_makes_an_export_once(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "hf"
    done = ran("export.py", f"run={run_dir}", f"out={out}", "dtype=bf16")
    assert "no missing or unexpected keys, logits equal to" in done.stdout and "(bf16; dtype=fp32 " in done.stdout
    texts = int(done.stdout.split("decoding equal on ")[1].split(" texts")[0].replace(",", ""))
    assert texts >= 1000
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "special_tokens_map.json", "README.md", "export.json",
    }  # fmt: skip
    about = json.loads((out / "config.json").read_text())
    assert about["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in about and about["attention_bias"]
    assert about["vocab_size"] == 1000, "padding of the vocabulary is left out"
    assert about["rope_theta"] == about["rope_parameters"]["rope_theta"] == 10000.0
    exported(run_dir, out, Dtype.bf16)
    assert "is the export of" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"hf exists"):
        exported(run_dir, out)


def test_dtype_is_the_runs(run_dir: Path, hf_dir: Path, tmp_path: Path, small: list[str]) -> None:
    trained(tmp_path / "auto", *small, "precision=auto", "steps=1")
    import_hf(hf_dir, tmp_path / "in")
    runs = (run_dir, tmp_path / "auto", tmp_path / "in")
    exports = [exported(run, tmp_path / f"{run.name}_hf", Dtype.auto) for run in runs]
    dtypes = [json.loads((out / "config.json").read_text())["dtype"] for out in exports]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]


def test_export_and_import_change_no_bit(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 50_000)
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
    second = read_weights(exported(tmp_path / "back", tmp_path / "hf2"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in again.items())


def test_files_are_readable_as_the_umask_says(hf_dir: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        import_hf(hf_dir, tmp_path / "run")
        exported(tmp_path / "run", tmp_path / "hf")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "state.json", "__0_0.distcp"} < set(modes)
    assert set(modes.values()) == {0o640}


def test_spellings_of_a_step(tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, second = tmp_path / "runs" / "r", "checkpoints/step-00000002"
    trained(run, *small, "steps=3", "checkpoint.every=1")
    older, newest = (open_checkpoint(run, step=step).read("model.")["norm.weight"] for step in (2, 3))
    (tmp_path / "best").symlink_to(run / second)
    (tmp_path / "same").symlink_to(run)
    for inside, spelt, step, expected in (
        (run, ".", 2, older), (run, f"{second}/", None, older), (run / "checkpoints", ".", 2, older),
        (run / second, ".", None, older), (run / second, "../step-00000003", None, newest),
        (tmp_path, "best", None, older), (tmp_path, f"same/{second}", None, older), (tmp_path, "same", None, newest),
    ):  # fmt: skip
        monkeypatch.chdir(inside)
        saved = open_saved(Path(spelt), step)
        assert torch.equal(saved.read()["norm.weight"], expected) and saved.tokenizer is not None, spelt
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
    trained(tmp_path / "r", *small, "steps=2", "optimizer.lr=0.3", *scaled, f"model.tie_embeddings={tied}")
    out = exported(tmp_path / "r", tmp_path / "hf", verified=True)
    assert "logits equal to" in capsys.readouterr().out
    tokens_BT = torch.arange(40).view(2, 20)
    before, after = (open_saved(path).build("cpu")(tokens_BT).detach() for path in (tmp_path / "r", out))
    torch.testing.assert_close(after, before[..., :1000], rtol=1e-4, atol=1e-5)
    about = json.loads((out / "config.json").read_text())
    assert about["architectures"] == [architecture]
    if tied == "true":
        again = read_config(out)[0]
        assert (again.width_ratio, again.depth_ratio) == (2, 2)
        (out / "config.json").write_text(json.dumps(about | {"embedding_multiplier": 12.0}))
        with pytest.raises(ModelError, match="multipliers"):
            read_config(out)


def test_export_without_a_tokenizer(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture) -> None:
    random = ["data=random", "data.seq_len=32", "data.vocab_size=1000", "steps=1"]
    trained(tmp_path / "r", *(o for o in small if not o.startswith("data")), *random, "data.micro_batch_size=2")
    assert (exported(tmp_path / "r", tmp_path / "hf", verified=True) / "model.safetensors").exists()
    assert "no tokenizer" in capsys.readouterr().out


def test_tokenizer_is_read_before_the_weights(hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ignored = shutil.ignore_patterns("tokenizer*", "*.safetensors")
    folder = shutil.copytree(hf_dir, tmp_path / "hf", ignore=ignored)
    with pytest.raises(ModelError, match="has no weights"):
        import_hf(folder, tmp_path / "run")
    assert "has no tokenizer" in capsys.readouterr().out
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        import_hf(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_transformers_cannot_read(hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(hf_dir, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*"))
    proto = sentencepiece_proto(hf_dir / "tokenizer.model")
    proto.normalizer_spec.add_dummy_prefix = proto.trainer_spec.treat_whitespace_as_suffix = True
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    import_hf(folder, tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "out", verified=True)
    assert capsys.readouterr().out.count("no equal tokenizer.json") == 2
    assert {p.name for p in (tmp_path / "out").glob("**/tokenizer*")} == {"tokenizer", "tokenizer.model"}


def test_init_content_of_an_import_is_the_model_alone(hf_dir: Path, tmp_path: Path, small: list[str]) -> None:
    import_hf(hf_dir, tmp_path / "in")
    content = ["model.vocab_size=1000", "init_content=[model,scheduler]"]
    with pytest.raises(CheckpointError, match=r"init_content \(model, scheduler\): .* has only a model"):
        trained(tmp_path / "r", *small, *content, f"init_from={tmp_path / 'in'}")


@pytest.mark.parametrize(
    ("file", "changes", "wrong"),
    [
        ("config.json", {"num_hidden_layers": 3}, "missing_keys"),
        ("config.json", {"attention_bias": False}, "unexpected_keys"),
        ("config.json", {"rms_norm_eps": 0.1}, "logits differ"),
        ("tokenizer.json", {"normalizer": None}, "token ids differ"),
    ],
)
def test_wrong_export(hf_dir: Path, tmp_path: Path, file: str, changes: dict, wrong: str) -> None:
    saved, folder = open_saved(hf_dir), shutil.copytree(hf_dir, tmp_path / "hf")
    about = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**about, **changes}))
    with pytest.raises(ModelError, match=wrong):
        export.verify(folder, saved.build("cpu"), saved.tokenizer, add_bos=saved.add_bos)


def test_failed_export_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "verify", Mock(side_effect=ModelError("wrong")))
    with pytest.raises(ModelError, match="wrong"):
        exported(run_dir, tmp_path / "hf", verified=True)
    assert not list(tmp_path.iterdir())


SHAPE = small_model(rope_theta=1e6)
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
        ("sliding_window", {"sliding_window": 4096}),
    ],
)
def test_config_that_would_give_other_logits_is_refused(tmp_path: Path, key: str, changes: dict) -> None:
    write_config(tmp_path, architectures=["InternLMForCausalLM"], attention_bias=None)
    assert read_config(tmp_path)[0].attention_bias, "InternLM-1 is a Llama with biases"
    write_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=key):
        read_config(tmp_path)


@pytest.mark.skipif(not TRANSFORMERS_4.is_dir(), reason=f"make test puts transformers 4.57 into {TRANSFORMERS_4}")
def test_transformers_4_reads_an_export(run_dir: Path, tmp_path: Path) -> None:
    settings = (f"run={run_dir}", f"out={tmp_path / 'hf'}")
    printed = ran("export.py", *settings, PYTHONPATH=str(TRANSFORMERS_4)).stdout
    assert "verified with transformers 4.57." in printed and "logits equal to" in printed
    assert "token ids and decoding equal on" in printed
