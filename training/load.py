"""Load a model and tokenizer from a run folder, a checkpoint, or a Hugging Face folder:

from training.load import load
model, tokenizer = load("runs/demo")
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import stored_model
from corpus.chat import ChatEncoder, chat_encoder
from data.config import TOKENIZER_FILES
from data.tokenizer import Tokenizer, adds_bos, load_tokenizer
from model.config import ModelConfig, ModelError
from model.hf.families import read_config, read_stop_ids, read_weights
from model.transformer import Transformer
from tracking.run_folder import run_dir_of
from tracking.store import local_run
from training.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved model, with weights that are read on demand."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    chat: ChatEncoder | None
    add_bos: bool
    stop_ids: set[int]  # tokens that end a text or an answer
    read: Callable[[], dict[str, Tensor]] = field(repr=False)  # fp32 weights by name, on the CPU
    checkpoint: Checkpoint | None = field(default=None, repr=False)  # of a run

    def build(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Transformer:
        """Return the model with its weights, ready for inference."""
        place = device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype or torch.float32
        model = Transformer.on_meta(self.config)
        model.load_state_dict({name: weight.to(*place) for name, weight in self.read().items()}, assign=True)
        return model.eval()


def load(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """Return the model and tokenizer saved at a path, by default in fp32, on a GPU if there is one."""
    saved = open_saved(local_run(str(path)))
    if saved.tokenizer is None:
        raise ModelError(f"{path} has no tokenizer; open_saved(path).build() returns the model alone")
    return saved.build(device, dtype), saved.tokenizer


def open_saved(path: Path, step: int | None = None) -> Saved:
    """Open a run folder, optionally at `step`, a checkpoint or a Hugging Face folder without reading weights."""
    if (path / "config.json").exists():
        tokenizer, ends = tokenizer_in(path), list[int | None](read_stop_ids(path))
        config, add_bos = read_config(path)[0], tokenizer is not None and adds_bos(path)
        read, checkpoint = partial(read_weights, path), None
    else:
        checkpoint = open_checkpoint(path, step=step)
        tokenizer = tokenizer_in(run_dir_of(checkpoint.path) / "tokenizer")
        config = stored_model(checkpoint.state["config"])
        add_bos = bool(checkpoint.state["data"]["add_bos"])
        ends, read = [], partial(checkpoint.read, "model.")
    chat = None if tokenizer is None else chat_encoder(tokenizer)
    ends += [tokenizer and tokenizer.eos_id, chat and chat.answer_end()]
    return Saved(config, tokenizer, chat, add_bos, {token for token in ends if token is not None}, read, checkpoint)


def tokenizer_in(folder: Path) -> Tokenizer | None:
    return load_tokenizer(folder) if any((folder / name).exists() for name in TOKENIZER_FILES) else None
