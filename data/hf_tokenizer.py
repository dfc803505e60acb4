"""A tokenizer as Hugging Face reads it: tokenizer.json, needing neither SentencePiece nor remote code."""

import json
import shutil
from pathlib import Path
from typing import Any

from corpus.config import DataError
from data.tokenizer import (
    CHAT_TEMPLATE,
    SPACE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    export_problem,
    sentencepiece_proto,
)


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, add_bos: bool, max_len: int) -> None:
    """Write a tokenizer for transformers 4 and 5, with tokenizer.model and the chat template if there are.

    As Hugging Face has it everywhere, the name of a control token written out in a text, such as
    `<s>`, becomes that token; SentencePiece alone would spell it.
    """
    import tokenizers

    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = fast_from_sentencepiece(tokenizer)
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        fast = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    names = {
        key: fast.id_to_token(token)
        for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        if token is not None
    }
    if add_bos and tokenizer.bos_id is not None:
        bos = names["bos_token"]
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    fast.save(str(folder / "tokenizer.json"))
    if isinstance(tokenizer, SentencePieceTokenizer):
        names["unk_token"] = tokenizer.model.id_to_piece(tokenizer.model.unk_id())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "pad_token": names.get("eos_token"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    template = tokenizer.path.with_name(CHAT_TEMPLATE)
    if template.exists():
        (folder / CHAT_TEMPLATE).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def fast_from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    """Build the `tokenizers` pipeline of a SentencePiece BPE model: the same merges in the same order.

    Raises `DataError` for a model of another kind, or one that changes its text before it is cut.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers

    if problem := export_problem(tokenizer):
        raise DataError(problem)
    proto = sentencepiece_proto(tokenizer.path)
    kinds = proto.SentencePiece
    # a character that SentencePiece takes for unused is written in bytes
    written = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    vocab = {piece: i for piece, i in written.items() if len(piece) > 1 or not tokenizer.model.is_unused(i)}
    merges = []
    for piece in proto.pieces:
        if piece.type == kinds.NORMAL:
            splits = ((piece.piece[:k], piece.piece[k:]) for k in range(1, len(piece.piece)))
            known = [(left, right) for left, right in splits if left in vocab and right in vocab]
            merges += [(-piece.score, vocab[left], vocab[right], left, right) for left, right in known]
    merges.sort(key=lambda merge: merge[:3])
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=proto.pieces[tokenizer.model.unk_id()].piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    defined = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    fast.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    return fast
