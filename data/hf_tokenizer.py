"""Export of tokenizers to Hugging Face's tokenizer.json, which needs neither SentencePiece nor remote code."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from data.cached_bpe import SPACE
from data.mixed_text import mixed_lines
from data.tokenizer import SentencePieceTokenizer, Tokenizer, save_tokenizer

if TYPE_CHECKING:
    import tokenizers


def write_hf_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, add_bos: bool, max_len: int, answer_end: int | None = None
) -> dict[str, int | None]:
    """Write a tokenizer for transformers 4 and 5, and tokenizer.model if there is one; return config.json's token ids.

    All settings are explicit. Encoding adds bos if training did, and never eos; eos of a chat model is the end of an
    answer. A tokenizer that transformers cannot represent goes into a sub-folder, where it is not loaded by mistake.
    """
    import tokenizers
    from tokenizers import processors

    eos = tokenizer.eos_id if answer_end is None else answer_end
    ids = {"bos": tokenizer.bos_id, "eos": eos, "pad": eos if tokenizer.eos_id is None else tokenizer.eos_id}
    token_ids = {f"{kind}_token_id": token for kind, token in ids.items()}
    if export_problem(tokenizer):
        save_tokenizer(tokenizer, folder / "tokenizer")
        return token_ids
    if isinstance(tokenizer, SentencePieceTokenizer):
        if not tokenizer.any_order:  # llama.cpp reads every tokenizer.model as BPE
            shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        fast = fast_from_sentencepiece(tokenizer)
    else:
        fast = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    named = {**ids, "unk": tokenizer.unk_id}
    special = {f"{kind}_token": fast.id_to_token(token) for kind, token in named.items() if token is not None}
    bos = [special["bos_token"]] if add_bos and tokenizer.bos_id is not None else []
    fast.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A"], pair=[*bos, "$A", *bos, "$B"], special_tokens=[(x, tokenizer.bos_id) for x in bos]
    )
    fast.save(str(folder / "tokenizer.json"))
    added = json.loads(fast.to_str())["added_tokens"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(bos),
        "add_eos_token": False,
        "add_prefix_space": tokenizer.adds_prefix_space,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": max_len,
        **special,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},  # for readers of tokenizer.model
    }
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return token_ids


def export_problem(tokenizer: Tokenizer) -> str | None:
    """Return why transformers cannot read a tokenizer; None if it can."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    rules = tokenizer.proto.trainer_spec
    if rules.model_type == rules.BPE and not tokenizer.normalizes:
        return None
    if rules.model_type in (rules.BPE, rules.UNIGRAM):
        fast = fast_from_sentencepiece(tokenizer)
        defined = [f"{name} a {name} b{name} " for name in tokenizer.special_ids if name not in tokenizer.controls]
        texts = [*mixed_lines(), *defined]
        encoded = ((fast.encode(x, add_special_tokens=False).ids, tokenizer.encode(x)) for x in texts)
        if all(found == ids or (tokenizer.any_order and sorted(found) == sorted(ids)) for found, ids in encoded):
            return None
    reason = f"{tokenizer.path} has no equal tokenizer.json, so transformers cannot read it"
    return f"{reason}; exports keep it in tokenizer/, for sentencepiece"


def fast_from_sentencepiece(tokenizer: SentencePieceTokenizer) -> "tokenizers.Tokenizer":
    """Return a SentencePiece BPE or Unigram model as a `tokenizers` pipeline."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

    proto, unk = tokenizer.proto, tokenizer.unk_id
    kinds, rules, trained = proto.SentencePiece, proto.normalizer_spec, proto.trainer_spec
    if trained.model_type == trained.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        fast = tokenizers.Tokenizer(models.Unigram(scored, unk, trained.byte_fallback))
    else:
        vocab, merges = _merges(tokenizer)
        unknown = proto.pieces[unk].piece
        fast = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        ends = r" +\z" if rules.add_dummy_prefix else r"\A +| +\z"  # leading spaces become the prefix
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(ends), "")]
    written = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        # Prefix the first word only, not text after special tokens. If whitespace is kept, a leading space is prefixed
        # too: then Metaspace looks for a plain space, which normalization has removed.
        mark = SPACE if rules.remove_extra_whitespaces else " "
        prefix = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="first", split=False)
        space = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([prefix, space])
        written.append(decoders.Strip(" ", 1, 0))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(written)
    control = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    defined = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    # Matched in normalized text, so that spaces next to them are not stripped as if at the ends of the text.
    fast.add_tokens([AddedToken(piece, normalized=True) for piece in defined])
    return fast


def _merges(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the ordered merges of a BPE model."""
    # Single characters that are unused in SentencePiece fall back to bytes.
    written = {piece.piece: i for i, piece in enumerate(tokenizer.proto.pieces)}
    vocab = {piece: i for piece, i in written.items() if len(piece) > 1 or not tokenizer.model.is_unused(i)}
    merges = []
    for piece in tokenizer.proto.pieces:
        if piece.type == tokenizer.proto.SentencePiece.NORMAL:
            splits = ((piece.piece[:k], piece.piece[k:]) for k in range(1, len(piece.piece)))
            known = [(left, right) for left, right in splits if left in vocab and right in vocab]
            merges += [(-piece.score, vocab[left], vocab[right], left, right) for left, right in known]
    merges.sort(key=lambda merge: merge[:3])
    return vocab, [(left, right) for *_, left, right in merges]
