from pathlib import Path

from torch import Tensor

from model.config import ModelConfig
from model.hf.llama import pad_vocabulary as pad_vocabulary
from model.hf.llama import read_hf


def read_config(folder: Path) -> tuple[ModelConfig, None]:
    return read_hf(folder)[0], None


def read_weights(folder: Path) -> dict[str, Tensor]:
    return read_hf(folder)[1]
