"""Text to token ids and back, by SentencePiece or by Hugging Face tokenizers."""

import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import xxhash

from corpus.config import DataError
from data.cached_bpe import LONGEST_TEXT, WordEncoder
from data.config import TOKENIZER_FILES, refuse_no_tokenizer
from data.safe_split import SPACE, cut, cuts_at_spaces, last_space, none_inside

PIECE_CHARS = LONGEST_TEXT >> 2
ANCHOR = "\U000ffffd"  # merges with nothing: what is beside it is encoded as within a text
CHAT_TEMPLATE = "chat_template.jinja"  # beside a tokenizer, as transformers has it
END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
BEGIN_OF_TEXT = ("<s>", "<|begin_of_text|>", "<bos>")


class Tokenizer(Protocol):
    """What both kinds offer. `encode` adds neither bos nor eos; an id the vocabulary lacks is None."""

    path: Path
    fingerprint: str  # of the model file
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        """Give the ids of texts, uint32."""
        ...

    def last_cut(self, text: str) -> int:
        """Give the last place where a text can be cut and its parts have the ids of the whole; 0 if none is known."""
        ...

    def decode(self, ids: list[int]) -> str: ...
    def token_bytes(self) -> np.ndarray:
        """Give the UTF-8 bytes each id stands for, int32 (V,); 0 for control tokens."""
        ...


class SentencePieceTokenizer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint = xxhash.xxh3_128_hexdigest(path.read_bytes())
        sentencepiece.set_min_log_level(2)  # errors: it warns each time that InternLM's piece of a zero byte is unused
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from None
        proto = sentencepiece_proto(path)
        self.words = WordEncoder.of(self.model, proto)
        self.cuts_at_spaces = _cuts_at_spaces(proto)
        self.exports = _exports(proto)
        self.vocab_size = self.model.vocab_size()
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.eos_id = self.model.eos_id() if self.model.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        if self.words is not None:
            return self.words.encode(texts)
        return [np.array(ids, dtype=np.uint32) for ids in self.model.encode(texts, num_threads=1)]

    def last_cut(self, text: str) -> int:
        if self.words is not None:
            return self.words.last_cut(text)
        return last_space(text) if self.cuts_at_spaces else 0

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token_bytes(self) -> np.ndarray:
        model = self.model
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token in range(self.vocab_size):
            if model.is_byte(token):
                lengths[token] = 1
            elif not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token)):
                lengths[token] = len(model.id_to_piece(token).replace(SPACE, " ").encode())
        return lengths


class HuggingFaceTokenizer:
    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        self.fingerprint = xxhash.xxh3_128_hexdigest(path.read_bytes())
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} is not a tokenizer.json: {error}") from None
        self.model.no_truncation()
        self.model.no_padding()
        self.cuts_at_spaces = cuts_at_spaces(json.loads(path.read_text(encoding="utf-8")))
        self.vocab_size = max(self.model.get_vocab().values(), default=-1) + 1  # there may be ids that nothing has
        settings = path.with_name("tokenizer_config.json")
        named = json.loads(settings.read_text()) if settings.exists() else {}
        self.bos_id = self._special(named.get("bos_token"), BEGIN_OF_TEXT)
        self.eos_id = self._special(named.get("eos_token"), END_OF_TEXT)

    def _special(self, named: Any, usual: tuple[str, ...]) -> int | None:
        if isinstance(named, dict):
            named = named.get("content")
        ids = (self.model.token_to_id(token) for token in ((named,) if named else usual))
        return next((token for token in ids if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def last_cut(self, text: str) -> int:
        return last_space(text) if self.cuts_at_spaces else 0

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        special = {i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        byte_level = "ByteLevel" in str(json.loads(self.path.read_text()).get("decoder"))
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, token in self.model.get_vocab().items():
            if token in special:
                continue
            if byte_level:
                lengths[token] = len(piece)  # one character stands for one byte
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                lengths[token] = 1
            else:
                lengths[token] = len(piece.replace(SPACE, " ").encode())
        return lengths


def _cuts_at_spaces(proto: Any) -> bool:
    """Say whether a SentencePiece model allows cuts before spaces that no blank precedes."""
    kinds, trainer, rules = proto.SentencePiece, proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not (trainer.byte_fallback and rules.escape_whitespaces):
        return False  # sums of a unigram model are rounded otherwise in another place
    if trainer.treat_whitespace_as_suffix or rules.precompiled_charsmap:
        return False
    return none_inside(p.piece for p in proto.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED))


def _exports(proto: Any) -> bool:
    """Say whether a SentencePiece model has an equal tokenizer.json, as `data.hf_tokenizer` makes it."""
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    changes = rules.add_dummy_prefix or rules.remove_extra_whitespaces or rules.precompiled_charsmap
    return trainer.model_type == trainer.BPE and not changes


def export_problem(tokenizer: Tokenizer) -> str | None:
    """Say why a tokenizer cannot be exported, and what to do; None if it can."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.exports:
        return None
    return (
        f"{tokenizer.path} is not a BPE model with the identity normaliser, no dummy prefix and no whitespace "
        "removal, so export.py can make no equal tokenizer.json of it; name the tokenizer.json of the same model "
        "instead, or a folder that holds both"
    )


def sentencepiece_proto(path: Path) -> Any:
    """Read a SentencePiece model as the message it is: its pieces, and how it was trained."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Open a SentencePiece `.model`, a `tokenizer.json`, a folder that holds one, or a Hugging Face name.

    Of a folder with both it is tokenizer.model, unless that cannot be exported.
    """
    path = Path(name)
    refuse_no_tokenizer(path)
    if path.is_dir():
        files = [path / file for file in TOKENIZER_FILES if (path / file).exists()]
        first = load_tokenizer(files[0])
        return load_tokenizer(files[-1]) if export_problem(first) else first
    if path.is_file():
        return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    return _from_hub(str(name))


def adds_bos(folder: Path) -> bool:
    """Say whether a Hugging Face folder's tokenizer begins every text with its bos token."""
    settings, fast = folder / "tokenizer_config.json", folder / "tokenizer.json"
    named = json.loads(settings.read_text()).get("add_bos_token") if settings.exists() else None
    if named is not None:
        return bool(named)
    processor = json.loads(fast.read_text()).get("post_processor") if fast.exists() else None
    return bool(processor) and "SpecialToken" in str((processor.get("single") or [None])[0])


def _from_hub(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"tokenizer.model ({name}) is neither a file nor a tokenizer on the hub: {reason}") from None
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer's files, so that `load_tokenizer(folder)` gives it back."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "tokenizer.json" if tokenizer.path.suffix == ".json" else "tokenizer.model"
    shutil.copyfile(tokenizer.path, folder / name)
    beside = ["tokenizer_config.json"] if name == "tokenizer.json" else []
    for other in (*beside, CHAT_TEMPLATE):
        if tokenizer.path.with_name(other).exists():
            shutil.copyfile(tokenizer.path.with_name(other), folder / other)


def train_tokenizer(
    texts: Iterator[str], path: Path, *, vocab_size: int, threads: int, special: Sequence[str] = ()
) -> Tokenizer:
    """Train a SentencePiece BPE tokenizer that gives back every text it is given, and write it to `path`.

    Identity normaliser, byte fallback, no dummy prefix, no whitespace removed, digits apart. Lines
    are its sentences, so no piece holds a newline: a newline is its byte. The names of `special` tokens
    are spelt in a text, as those of all control tokens are.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=threads,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(special),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"^\w+: \S+ \[.*?\] ", "", str(error))  # without its place in SentencePiece's code
        raise DataError(
            f"no tokenizer of {vocab_size} pieces (tokenizer.vocab_size) can be trained on this text: {reason}"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def encode_documents(
    tokenizer: Tokenizer,
    texts: list[str],
    *,
    add_bos: bool,
    add_eos: bool,
    begins: bool = True,
    ends: bool = True,
) -> list[np.ndarray]:
    """Give documents' ids, uint32, in memory of a few times their text however long one is.

    A text of more than `PIECE_CHARS` is cut where the tokenizer allows it alone, so the ids are those of the whole;
    without `begins` or `ends` each text is itself such a part.
    """
    before = [[tokenizer.bos_id]] if add_bos and begins and tokenizer.bos_id is not None else []
    after = [[tokenizer.eos_id]] if add_eos and ends and tokenizer.eos_id is not None else []
    parts = [list(cut(text, PIECE_CHARS, tokenizer.last_cut)) for text in texts]
    if begins and ends and all(len(its) < 2 for its in parts):
        found = tokenizer.encode_many([part for its in parts for part in its])
    else:
        inside = [(begins and not k, ends and k == len(its) - 1, part) for its in parts for k, part in enumerate(its)]
        found = _encode_parts(tokenizer, inside)
    ids = iter(found)
    empty = np.zeros(0, dtype=np.uint32)
    framed = ([*before, *islice(ids, len(its)), *after] for its in parts)
    return [np.concatenate([empty, *its], dtype=np.uint32, casting="unsafe") for its in framed]


def _encode_parts(tokenizer: Tokenizer, parts: list[tuple[bool, bool, str]]) -> list[np.ndarray]:
    """Give the ids of parts of texts, each with whether it begins and whether it ends one.

    Some tokenizers put a blank before a text or take blanks from its ends; within a text they must not.
    """
    first = len(tokenizer.encode(ANCHOR))  # perhaps with a blank before it
    last = len(tokenizer.encode(ANCHOR + ANCHOR)) - first
    if tokenizer.encode(f"{ANCHOR} a{ANCHOR}")[first:-last] == tokenizer.encode(" a"):
        return tokenizer.encode_many([text for _, _, text in parts])
    marked = [f"{'' if begins else ANCHOR}{text}{'' if ends else ANCHOR}" for begins, ends, text in parts]
    found = zip(parts, tokenizer.encode_many(marked), strict=True)
    return [ids[0 if begins else first : len(ids) if ends else len(ids) - last] for (begins, ends, _), ids in found]
