"""Give a run to the world, or bring a model in: python export.py run=runs/demo, python export.py from_hf=folder."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from conf.cli import report_user_errors, run
from conf.schema import ExportConfig, stored_model, to_config
from model.config import ModelConfig, ModelError

if TYPE_CHECKING:
    import torch

    from data.tokenizer import Tokenizer
    from training.checkpoint import Checkpoint

SHARD_BYTES = 5_000_000_000
VOCABULARY_WEIGHTS = ("model.embed.weight", "model.head.weight")
LOGITS_TOLERANCE = 1e-4
VERIFY = Path(__file__).parent / "model" / "verify_hf.py"
CARD = """---
library_name: transformers
---

# {name}

{params:,} parameters, step {step:,} of `{run}`. Loads with transformers 4.57 and 5, without remote code:

    model = AutoModelForCausalLM.from_pretrained("{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
"""


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    config: ExportConfig = to_config(cfg)
    with report_user_errors():
        if config.from_hf is not None:
            bring_in(Path(config.from_hf), config.out)
        else:
            assert config.run is not None
            export(Path(config.run), config)


def export(run_path: Path, config: ExportConfig) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder, and let it be seen only if it verifies."""
    from corpus.config import DataError
    from data.tokenizer import export_problem, load_tokenizer
    from training.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(run_path)
    run_dir = checkpoint.path.parent.parent
    out = Path(config.out) if config.out else run_dir / "hf"
    origin = {
        "checkpoint": json.loads((checkpoint.path / "manifest.json").read_text()),
        "dtype": config.dtype.value,
    }
    if out.exists():
        made = out / "export.json"
        if made.exists() and json.loads(made.read_text()) == origin:
            print(f"{out} is the export of {checkpoint.path} already")
            return
        raise ModelError(
            f"{out} exists and is no export of {checkpoint.path} in {config.dtype.value}; "
            "remove it, or pass another out="
        )
    tokenizer = load_tokenizer(run_dir / "tokenizer") if (run_dir / "tokenizer").exists() else None
    if tokenizer is not None and (problem := export_problem(tokenizer)):
        raise DataError(problem)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model = without_padding(checkpoint, tokenizer)
        write(partial, out, checkpoint, model, tokenizer, config)
        (partial / "export.json").write_text(json.dumps(origin))
        verify(partial, model, tokenizer)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"exported step {checkpoint.step} of {run_dir} to {out} ({config.dtype.value})")


def without_padding(checkpoint: "Checkpoint", tokenizer: "Tokenizer | None") -> ModelConfig:
    """Give a checkpoint's model with the vocabulary of its tokenizer: ids beyond it stand for nothing.

    They fill a vocabulary up to what tensor parallelism can divide. A model that was brought in keeps what it had.
    """
    model = stored_model(checkpoint.state["config"])
    if tokenizer is None or not checkpoint.state["data"]["parts"]:
        return model
    return replace(model, vocab_size=min(model.vocab_size, tokenizer.vocab_size))


def write(
    folder: Path,
    out: Path,
    checkpoint: "Checkpoint",
    model: ModelConfig,
    tokenizer: "Tokenizer | None",
    config: ExportConfig,
) -> None:
    """Write weights, configuration, tokenizer and card into a folder."""
    from corpus.chat import answer_end
    from data.hf_tokenizer import write_hf_tokenizer
    from model.hf.llama import llama_config

    dtype = write_weights(folder, checkpoint, config, vocab_size=model.vocab_size)
    bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
    about = llama_config(model, bos_id=bos, eos_id=eos, pad_id=eos, dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    ids: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    if tokenizer is not None and (end := answer_end(tokenizer)) is not None:
        ids["eos_token_id"] = [end] if eos is None else [eos, end]
    generation = {
        "_from_model_config": False,
        **{key: token for key, token in ids.items() if token is not None},
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if tokenizer is not None:
        add_bos = checkpoint.state["data"]["add_bos"]
        write_hf_tokenizer(tokenizer, folder, add_bos=add_bos, max_len=model.max_seq_len)
    run_dir = checkpoint.path.parent.parent
    card = CARD.format(name=model.name, params=model.n_params, step=checkpoint.step, run=run_dir, out=out)
    (folder / "README.md").write_text(card)


def write_weights(folder: Path, checkpoint: "Checkpoint", config: ExportConfig, *, vocab_size: int) -> "torch.dtype":
    """Write the master weights in the asked-for dtype, in shards of about 5 GB, one in memory at a time."""
    import torch
    from safetensors.torch import save_file

    from model.hf.llama import to_llama_name

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype.value]
    names = [name for name in checkpoint.tensors if name.startswith("model.")]
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        n_bytes = checkpoint.tensors[name].size.numel() * dtype.itemsize
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, tensor in checkpoint.read_names(shard).items():
            if name in VOCABULARY_WEIGHTS:
                tensor = tensor[:vocab_size]
            if not torch.isfinite(tensor.to(dtype)).all():
                raise ModelError(
                    f"{checkpoint.path}: {name} holds values outside dtype ({config.dtype.value}); "
                    "export with dtype=bf16"
                )
            tensors[to_llama_name(name.removeprefix("model."))] = tensor.to(dtype).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(about, indent=2) + "\n")
    return dtype


def verify(folder: Path, config: ModelConfig, tokenizer: "Tokenizer | None") -> None:
    """Load the folder with transformers in a fresh process and compare keys, logits and token ids with ours."""
    import torch
    from safetensors.torch import save_file

    from data.mixed_text import mixed_lines
    from model.hf.llama import read_hf
    from model.transformer import Transformer

    model = Transformer(config)
    model.load_state_dict(read_hf(folder)[1])
    tokens_BT = torch.randint(
        config.vocab_size, (2, min(64, config.max_seq_len)), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits_BTV = model(tokens_BT)
    texts = [] if tokenizer is None else [(line, tokenizer.encode(line)) for line in mixed_lines()]
    with tempfile.TemporaryDirectory() as scratch:
        logits_file, expected = Path(scratch) / "logits.safetensors", Path(scratch) / "expected.json"
        save_file({"tokens": tokens_BT, "logits": logits_BTV.contiguous()}, logits_file)
        expected.write_text(json.dumps({"logits": str(logits_file), "texts": texts}))
        command = [sys.executable, "-P", str(VERIFY.resolve()), str(folder.resolve()), str(expected)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise ModelError(
            f"transformers cannot load what was written, so nothing was exported: "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    judge(json.loads(done.stdout.splitlines()[-1]))


def judge(found: dict[str, Any]) -> None:
    """Say what a fresh process found, and raise `ModelError` if any of it is wrong."""
    wrong_keys = {kind: names for kind, names in found["keys"].items() if names}
    if wrong_keys:
        raise ModelError(f"the export has wrong keys, so it was not kept: {wrong_keys}")
    if not found["logits_difference"] <= LOGITS_TOLERANCE:
        raise ModelError(
            f"the export's logits differ by {found['logits_difference']:.2e} from ours, so it was not kept"
        )
    if found.get("wrong_count"):
        raise ModelError(
            f"the export's tokenizer differs on {found['wrong_count']} texts, so it was not kept: "
            f"{found['wrong_texts'][0]}"
        )
    texts = f"token ids and decoding equal on {found['texts']:,} texts" if "texts" in found else "no tokenizer"
    print(
        f"verified with transformers {found['transformers']} ({found['class']}): no missing or unexpected keys, "
        f"logits equal to {found['logits_difference']:.1e}, {texts}"
    )


def bring_in(folder: Path, out: str | None) -> None:
    """Turn a Hugging Face folder into a run folder with one checkpoint, from which to train, generate or export."""
    from conf.schema import to_plain
    from data.tokenizer import adds_bos, save_tokenizer
    from model.hf.llama import read_hf
    from tracking.run_folder import locked
    from training.checkpoint import Checkpoints
    from training.state import TrainState

    run_dir = Path(out) if out else Path("runs") / folder.resolve().name
    if (run_dir / "checkpoints").exists():
        raise ModelError(f"{run_dir} is a run already; pass another out=")
    tokenizer = tokenizer_of(folder)
    config, weights = read_hf(folder)
    with locked(run_dir):
        if tokenizer is not None:
            save_tokenizer(tokenizer, run_dir / "tokenizer")
        state = {
            "config": {"name": run_dir.name, "model": to_plain(config)},
            "data": {
                "parts": [],
                "sources": [],
                "add_bos": tokenizer is not None and adds_bos(folder),
                "add_eos": False,
            },
            "progress": TrainState().state_dict(),
            "scaler": {},
        }
        path = Checkpoints(run_dir, keep=0).save(0, {f"model.{name}": t for name, t in weights.items()}, state)
    print(f"brought {config.n_params:,} parameters of {folder} into {path}; train from them with init_from={run_dir}")


def tokenizer_of(folder: Path) -> "Tokenizer | None":
    """Open the tokenizer of a Hugging Face folder, and say before any weights are read what will not be possible."""
    from data.config import TOKENIZER_FILES
    from data.tokenizer import export_problem, load_tokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        print(
            f"{folder} holds no tokenizer, neither {' nor '.join(TOKENIZER_FILES)}: generate.py will not be able to "
            "write with what is brought in, and its export will have none"
        )
        return None
    tokenizer = load_tokenizer(folder)
    if problem := export_problem(tokenizer):
        print(problem)
    return tokenizer


if __name__ == "__main__":
    run(main, "export")
