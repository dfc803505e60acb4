"""Export a run to Hugging Face: python export.py run=runs/demo; or import: from_hf=folder, from_internlm=folder."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # no traceback on Ctrl-C during imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from conf.cli import run
from conf.schema import ExportConfig, stored_model, to_plain
from model.config import ModelConfig, ModelError

if TYPE_CHECKING:
    import torch

    from data.tokenizer import Tokenizer
    from model.transformer import Transformer
    from training.checkpoint import Checkpoint

SHARD_BYTES = 5_000_000_000
LOGITS_TOLERANCE = 1e-4  # of transformers' logits, in fp32
CARD = """---
library_name: transformers
---

# {name}

{params:,} parameters, step {step:,} of `{run}`. Loads with transformers 4.57 and 5, without remote code:

    model = AutoModelForCausalLM.from_pretrained("{out}")
    tokenizer = AutoTokenizer.from_pretrained("{out}")
"""


def main(config: ExportConfig) -> None:
    (import_model if config.run is None else export)(config)


def export(config: ExportConfig) -> None:
    """Write the newest checkpoint of a run, or that of `step`, as a Hugging Face folder, and verify it."""
    from data.hf_tokenizer import export_problem
    from model.counts import count_params
    from tracking.run_folder import run_dir_of
    from tracking.store import local_run
    from training.checkpoint import open_checkpoint
    from training.load import open_saved, tokenizer_in
    from training.setup import DTYPES

    checkpoint = open_checkpoint(local_run(str(config.run), config.step), step=config.step)
    run_dir = run_dir_of(checkpoint.path)
    out = Path(config.out) if config.out else run_dir / "hf"
    manifest = json.loads((checkpoint.path / "manifest.json").read_text(encoding="utf-8"))
    trained_in = checkpoint.state["config"].get("precision", {}).get("compute", "auto")  # none in an imported run
    name = next(dtype for dtype in (config.dtype.value, trained_in, "bf16") if dtype != "auto")
    origin = {"checkpoint": manifest, "dtype": name}
    if out.exists():
        if (made := out / "export.json").exists() and json.loads(made.read_text(encoding="utf-8")) == origin:
            print(f"{out} is the export of {checkpoint.path} already")
            return
        raise ModelError(f"{out} exists and is not this export; remove it, or pass another out=")
    tokenizer = tokenizer_in(run_dir / "tokenizer")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model, dtype = stored_model(checkpoint.state["config"]), DTYPES[name]
        add_bos = tokenizer is not None and tokenizer.bos_id is not None and bool(checkpoint.state["data"]["add_bos"])
        if tokenizer is not None and checkpoint.state["data"]["parts"]:  # an imported model keeps its vocabulary
            model = replace(model, vocab_size=min(model.vocab_size, tokenizer.vocab_size))
        write_weights(partial, checkpoint, model, dtype)
        write_settings(partial, model, tokenizer, dtype, add_bos=add_bos)
        card = CARD.format(name=model.name, params=count_params(model), step=checkpoint.step, run=run_dir, out=out)
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_json(partial / "export.json", origin)
        if tokenizer is not None and not (partial / "tokenizer.json").exists():
            print(export_problem(tokenizer))
        print(verify(partial, open_saved(partial).build("cpu"), tokenizer, add_bos=add_bos))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    rounded = "" if name == "fp32" else "; dtype=fp32 keeps the weights exact"
    print(f"exported step {checkpoint.step} of {run_dir} to {out} ({name}{rounded})")


def write_weights(folder: Path, checkpoint: "Checkpoint", model: ModelConfig, dtype: "torch.dtype") -> None:
    """Write the weights in shards of about 5 GB, one in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    from model.hf.families import export_family
    from model.transformer import Transformer

    family = export_family(model)
    names = {hf_name: name for name, hf_name in family.names(model).items()}
    shapes = {name: param.shape for name, param in Transformer.on_meta(model).named_parameters()}
    split = split_state_dict_into_shards_factory(
        {hf_name: shapes[name].numel() * dtype.itemsize for hf_name, name in names.items()},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, shard in split.filename_to_tensors.items():
        read = checkpoint.read_names([f"model.{names[hf_name]}" for hf_name in shard])
        # without the padding of the vocabulary
        rows = {hf_name: read[f"model.{names[hf_name]}"][: shapes[names[hf_name]][0]] for hf_name in shard}
        scaled = {hf_name: tensor * family.factor(names[hf_name], model) for hf_name, tensor in rows.items()}
        tensors = {hf_name: tensor.to(dtype).contiguous() for hf_name, tensor in scaled.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file ignores the umask
    if split.is_sharded:
        about = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", about)


def write_settings(
    folder: Path, model: ModelConfig, tokenizer: "Tokenizer | None", dtype: "torch.dtype", *, add_bos: bool
) -> None:
    """Write config.json, generation_config.json and the tokenizer."""
    from corpus.chat import chat_encoder
    from data.hf_tokenizer import write_hf_tokenizer
    from data.tokenizer import CHAT_TEMPLATE
    from model.hf.families import export_family

    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    chat = tokenizer and chat_encoder(tokenizer)
    end = chat and chat.answer_end()
    if tokenizer is not None:
        # eos is the end of an answer, unless the template itself writes eos.
        eos = None if chat and "eos_token" in chat.template else end
        ids = write_hf_tokenizer(tokenizer, folder, add_bos=add_bos, max_len=model.max_seq_len, answer_end=eos)
    if chat is not None:
        # Clients do not add bos to a rendered conversation.
        template = chat.template_with_bos() if add_bos else chat.template
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    about = export_family(model).write_config(model, dtype=str(dtype).removeprefix("torch."), **ids)
    write_json(folder / "config.json", about)
    if tokenizer is not None and end is not None and tokenizer.eos_id not in (None, end):
        ids["eos_token_id"] = [tokenizer.eos_id, end]
    named = {key: token for key, token in ids.items() if token is not None}
    write_json(folder / "generation_config.json", {"_from_model_config": False, **named})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path, model: "Transformer", tokenizer: "Tokenizer | None", *, add_bos: bool) -> str:
    """Load an export with transformers; return what was compared, and raise `ModelError` if anything differs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
    from transformers.utils import logging

    from data.mixed_text import mixed_lines

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not (folder / "tokenizer.json").exists():
        tokenizer = None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        theirs: Any = tokenizer and AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"transformers cannot load the export: {error}") from error
    (hf_model, info), n_texts = loaded, 0
    shape = 2, min(64, model.config.max_seq_len)
    tokens_BT = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((hf_model.eval()(tokens_BT).logits - model(tokens_BT)).abs().max())
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{kind} {sorted(map(str, info[kind]))}" for kind in kinds if info[kind]]
    if not difference <= LOGITS_TOLERANCE:
        wrong.append(f"logits differ by {difference:.2e}")
    if tokenizer is not None:
        texts = ["", *mixed_lines()]
        if different := [text for text in texts if not _equal(text, tokenizer, theirs, add_bos)]:
            wrong.append(f"token ids differ on {different[0]!r}")
        n_texts = len(texts)
    if wrong:
        raise ModelError(f"nothing was exported: {'; '.join(wrong)}")
    of_texts = f"token ids and decoding equal on {n_texts:,} texts" if n_texts else "no tokenizer.json"
    version = f"transformers {__version__} ({type(hf_model).__name__})"
    return f"verified with {version}: no missing or unexpected keys, logits equal to {difference:.1e}, {of_texts}"


def _equal(text: str, tokenizer: "Tokenizer", theirs: Any, add_bos: bool) -> bool:
    ids = tokenizer.encode(text)
    expected, found = [*([tokenizer.bos_id] if add_bos else []), *ids], theirs(text)["input_ids"]
    comparable = sorted if tokenizer.any_order else list
    if comparable(found) != comparable(expected):
        return False
    # Unknown text cannot be decoded back.
    return tokenizer.unk_id in ids or theirs.decode(expected, skip_special_tokens=True) == tokenizer.decode(ids)


def import_model(config: ExportConfig) -> None:
    """Convert a Hugging Face or InternLM folder to a run folder with one checkpoint."""
    from data.hf_tokenizer import export_problem
    from data.tokenizer import adds_bos, load_tokenizer, save_tokenizer
    from model.hf.families import read_config, read_weights
    from model.hf.internlm_training import read_training_checkpoint
    from tracking.run_folder import locked
    from training.checkpoint import Checkpoints
    from training.config import CheckpointConfig
    from training.load import tokenizer_in
    from training.state import TrainState

    folder = Path(str(config.from_hf or config.from_internlm))
    run_dir = Path(config.out) if config.out else Path("runs") / folder.resolve().name
    if (run_dir / "checkpoints").exists():
        raise ModelError(f"{run_dir} is a run already; pass another out=")
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else tokenizer_in(folder)
    if tokenizer is None:
        print(f"{folder} has no tokenizer: generate.py cannot use {run_dir}, and an export of it will have none")
    elif problem := export_problem(tokenizer):
        print(problem)
    if config.from_hf is not None:
        model, weights = read_config(folder)[0], read_weights(folder)
        add_bos = tokenizer is not None and adds_bos(folder)
    else:
        model, weights = read_training_checkpoint(folder)
        add_bos = True  # as in InternLM's tokenization
    state = {
        "config": {"name": run_dir.name, "model": to_plain(model)},
        "data": {"parts": [], "sources": [], "add_bos": add_bos, "add_eos": False},
        "progress": TrainState().state_dict(),
        "scaler": {},
    }
    with locked(run_dir):
        if tokenizer is not None:
            save_tokenizer(tokenizer, run_dir / "tokenizer")
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        path = Checkpoints(run_dir, CheckpointConfig()).save(0, tensors, state)
    n_params = sum(weight.numel() for weight in weights.values())
    print(f"imported {n_params:,} parameters of {folder} into {path}; train from them with init_from={run_dir}")


if __name__ == "__main__":
    run(main, "export")
