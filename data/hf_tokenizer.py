"""A tokenizer as Hugging Face reads it: tokenizer.json, needing neither SentencePiece nor remote code."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from corpus.config import DataError
from data.cached_bpe import SPACE
from data.tokenizer import CHAT_TEMPLATE, SentencePieceTokenizer, Tokenizer, export_problem, sentencepiece_proto

if TYPE_CHECKING:
    import tokenizers


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, add_bos: bool, max_len: int) -> None:
    """Write a tokenizer for transformers 4 and 5, with tokenizer.model and the chat template where there are any.

    As everywhere in Hugging Face, the name of a control token written out in a text, such as `<s>`, becomes that
    token; SentencePiece alone would spell it out.
    """
    import tokenizers

    tokens = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = fast_from_sentencepiece(tokenizer)
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        tokens["unk_token"] = tokenizer.model.unk_id()
    else:
        fast = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    names = {key: fast.id_to_token(token) for key, token in tokens.items() if token is not None}
    if add_bos and tokenizer.bos_id is not None:
        bos = names["bos_token"]
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    fast.save(str(folder / "tokenizer.json"))
    if "eos_token" in names:
        names["pad_token"] = names["eos_token"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": max_len}
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    template = tokenizer.path.with_name(CHAT_TEMPLATE)
    if template.exists():
        shutil.copyfile(template, folder / CHAT_TEMPLATE)


def fast_from_sentencepiece(tokenizer: SentencePieceTokenizer) -> "tokenizers.Tokenizer":
    """Return the `tokenizers` pipeline of a SentencePiece BPE model: the same merges in the same order.

    Raises `DataError` for a model of another kind, or one that normalizes text.
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
    unknown = proto.pieces[tokenizer.model.unk_id()].piece
    pairs = [(left, right) for *_, left, right in merges]
    fast = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    defined = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    fast.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    return fast
