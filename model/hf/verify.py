"""Load an exported folder with transformers and compare its output with the original model's."""

from pathlib import Path
from typing import Any

import torch

from data.mixed_text import mixed_lines
from data.tokenizer import Tokenizer
from model.config import ModelError
from model.transformer import Transformer

LOGITS_TOLERANCE = 1e-4


def verify(folder: Path, model: Transformer, tokenizer: Tokenizer | None, *, add_bos: bool) -> str:
    """Return a summary of what was compared; raise `ModelError` if anything differs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
    from transformers.utils import logging

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


def _equal(text: str, tokenizer: Tokenizer, theirs: Any, add_bos: bool) -> bool:
    ids = tokenizer.encode(text)
    expected, found = [*([tokenizer.bos_id] if add_bos else []), *ids], theirs(text)["input_ids"]
    comparable = sorted if tokenizer.any_order else list
    if comparable(found) != comparable(expected):
        return False
    # Unknown text cannot be decoded back.
    return tokenizer.unk_id in ids or theirs.decode(expected, skip_special_tokens=True) == tokenizer.decode(ids)
