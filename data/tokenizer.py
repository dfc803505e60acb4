"""SentencePiece and Hugging Face tokenizers behind one interface."""

import io
import json
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import xxhash

from corpus.config import DataError
from data.cached_bpe import SPACE, CachedBPE
from data.config import TOKENIZER_FILES, check_tokenizer
from data.mixed_text import mixed_lines

ANCHOR = "\U000ffffd"  # merges with nothing, so that text after it is encoded as inside a text
INCOMPLETE = "\ufffd"  # decoded from an incomplete character
CHAT_TEMPLATE = "chat_template.jinja"  # transformers' file name
END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
BEGIN_OF_TEXT = ("<s>", "<|begin_of_text|>", "<bos>")


class Tokenizer(ABC):
    """Text to ids and back. `encode` adds neither bos nor eos, whose ids are None if the vocabulary lacks them.

    The name of a special token in a text is encoded as text, or with `special` as the token.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None = None
    special_ids: dict[str, int]  # control and user-defined pieces, or the added tokens of a tokenizer.json
    any_order = False  # some texts have several equally probable encodings, of the same tokens

    def __init__(self, path: Path) -> None:
        self.path, self.fingerprint = path, xxhash.xxh3_128_hexdigest(path.read_bytes())

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]: ...

    @abstractmethod
    def encode_many(self, texts: list[str], *, special: bool = False) -> list[np.ndarray]:
        """Return the ids of texts, uint32; faster than `encode`."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @cached_property
    def adds_prefix_space(self) -> bool:
        """Whether the tokenizer puts a space before every text."""
        return self.encode("a") != self._encode_after_anchor("a")

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that continues another, without a prefix space."""
        return self._encode_after_anchor(text) if self.adds_prefix_space else self.encode(text)

    def _encode_after_anchor(self, text: str) -> list[int]:
        before, ids = self.encode(ANCHOR), self.encode(ANCHOR + text)
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text)

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, int32 (V,); 0 for control tokens."""


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        sentencepiece.set_min_log_level(2)  # errors only; InternLM's tokenizer has a harmless warning
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from None
        self.proto = proto = sentencepiece_proto(path)
        kinds, rules = proto.SentencePiece, proto.normalizer_spec
        is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
        self.normalizes = bool(rules.add_dummy_prefix or rules.remove_extra_whitespaces or rules.precompiled_charsmap)
        named = [(i, piece.piece.replace(SPACE, " "), piece.type) for i, piece in enumerate(proto.pieces)]
        self.controls = {name: i for i, name, kind in named if kind in (kinds.CONTROL, kinds.UNKNOWN)}
        self.special_ids = self.controls | {name: i for i, name, kind in named if kind == kinds.USER_DEFINED}
        self.any_order = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
        # Without byte fallback, adjacent unknown characters become one id, which splitting would change.
        can_split = is_bpe and proto.trainer_spec.byte_fallback and rules.escape_whitespaces
        self.cached = None
        if can_split:  # its input is already normalized, so the model it uses must not normalize again
            plain = sentencepiece_proto(path)
            plain.normalizer_spec.add_dummy_prefix = plain.normalizer_spec.remove_extra_whitespaces = False
            plain.normalizer_spec.precompiled_charsmap = b""
            model = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
            inside_texts = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
            self.cached = CachedBPE(model, [piece.piece for piece in proto.pieces if piece.type in inside_texts])
        self.vocab_size = self.model.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id()))
        self.unk_id = self.model.unk_id()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._with_controls(text) if special else self.model.encode(text)

    def _with_controls(self, text: str) -> list[int]:
        names = re.compile(f"({'|'.join(map(re.escape, sorted(self.controls, key=len, reverse=True)))})")
        ids: list[int] = []
        for k, part in enumerate(names.split(text)):  # text, name, text, ..., text
            encode = self.encode_inside if k else self.encode
            ids += [self.controls[part]] if k % 2 else encode(part)
        return ids

    def encode_many(self, texts: list[str], *, special: bool = False) -> list[np.ndarray]:
        if special:
            return [np.array(self._with_controls(text), dtype=np.uint32) for text in texts]
        if self.cached is None:
            return [np.array(ids, dtype=np.uint32) for ids in self.model.encode(texts, num_threads=1)]
        return self.cached.encode(self.model.normalize(texts) if self.normalizes else texts)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token_bytes(self) -> np.ndarray:
        model, lengths = self.model, np.zeros(self.vocab_size, dtype=np.int32)
        for token in range(self.vocab_size):
            if not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token)):
                piece = model.id_to_piece(token).replace(SPACE, " ")
                lengths[token] = 1 if model.is_byte(token) else len(piece.encode())
        return lengths


class HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        import tokenizers

        super().__init__(path)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} is not a tokenizer.json: {error}") from None
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab = self.model.get_vocab()
        self.vocab_size = max(self.vocab.values(), default=-1) + 1  # some ids may have no token
        added = self.model.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}
        self.special_ids = {token.content: i for i, token in added.items()}
        named = _read_json(path.with_name("tokenizer_config.json"))
        self.bos_id = self._special_id(named.get("bos_token"), BEGIN_OF_TEXT)
        self.eos_id = self._special_id(named.get("eos_token"), END_OF_TEXT)

    def _special_id(self, named: Any, usual: tuple[str, ...]) -> int | None:
        if isinstance(named, dict):
            named = named.get("content")
        ids = (self.model.token_to_id(token) for token in ((named,) if named else usual))
        return next((token for token in ids if token is not None), None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.encode_many([text], special=special)[0].tolist()

    def encode_many(self, texts: list[str], *, special: bool = False) -> list[np.ndarray]:
        self.model.encode_special_tokens = not special
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        byte_level = "ByteLevel" in str(_read_json(self.path).get("decoder"))
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, token in self.vocab.items():
            if token not in self.special:
                plain = re.sub("^<0x[0-9A-F]{2}>$", "b", piece.replace(SPACE, " "))  # byte tokens have one byte
                lengths[token] = len(piece) if byte_level else len(plain.encode())  # ByteLevel: one character per byte
        return lengths


def sentencepiece_proto(path: Path) -> Any:
    """Read a SentencePiece model as a protobuf message."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Open a SentencePiece `.model`, a `tokenizer.json`, a folder with one of them, or a Hugging Face name.

    If a folder has both and they agree, tokenizer.model is used, which is faster; otherwise tokenizer.json.
    """
    path = Path(name)
    check_tokenizer(path)
    if path.is_dir():
        first, *others = (load_tokenizer(path / file) for file in TOKENIZER_FILES if (path / file).exists())
        for other in others:
            same = (first.vocab_size, first.special_ids) == (other.vocab_size, other.special_ids)
            texts = (*mixed_lines(), *first.special_ids)
            if not same or any(first.encode(text) != other.encode(text) for text in texts):
                return other
        return first
    if path.is_file():
        return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    from transformers import AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    try:
        AutoTokenizer.from_pretrained(str(name), use_fast=True).save_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"tokenizer.model ({name}) is neither a file nor a tokenizer on the hub: {reason}") from None
    return load_tokenizer(folder)


def add_tokens(folder: Path, names: Sequence[str]) -> Tokenizer:
    """Add missing special tokens to the tokenizer in a folder; return the tokenizer."""
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        known = {token.content for token in tokenizer.model.get_added_tokens_decoder().values()}
        tokenizer.model.add_special_tokens([name for name in names if name not in known])
        tokenizer.model.save(str(tokenizer.path))
    else:
        proto = sentencepiece_proto(tokenizer.path)
        known = {piece.piece for piece in proto.pieces}
        for name in (name for name in dict.fromkeys(names) if name not in known):
            proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.CONTROL)
        tokenizer.path.write_bytes(proto.SerializeToString())
    return load_tokenizer(folder)


def adds_bos(folder: Path) -> bool:
    """Return whether a Hugging Face folder's tokenizer adds bos."""
    if (named := _read_json(folder / "tokenizer_config.json").get("add_bos_token")) is not None:
        return bool(named)
    if not (folder / "tokenizer.json").exists():
        return True  # the default of the SentencePiece tokenizers of Llama, InternLM and InternLM2
    tokenizer = HuggingFaceTokenizer(folder / "tokenizer.json")
    return tokenizer.bos_id is not None and tokenizer.model.encode("a").ids[:1] == [tokenizer.bos_id]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer's files to a folder, for `load_tokenizer(folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer.path, folder / f"tokenizer{'.json' if tokenizer.path.suffix == '.json' else '.model'}")
    for other in ("tokenizer_config.json", CHAT_TEMPLATE):
        if (path := tokenizer.path.with_name(other)).exists():
            shutil.copyfile(path, folder / other)


def train_tokenizer(
    texts: Iterator[str], path: Path, *, vocab_size: int, threads: int, special: Sequence[str] = ()
) -> Tokenizer:
    """Train a lossless SentencePiece BPE tokenizer and write it to `path`.

    Identity normalizer, byte fallback, no dummy prefix, whitespace kept, single digits. Sentences are lines, so no
    piece has a newline, which is encoded as its byte. `special` tokens are control tokens.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    text = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    pieces = {"allow_whitespace_only_pieces": True, "byte_fallback": True, "split_digits": True}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "control_symbols": list(special)}
    corpus = {"sentence_iterator": lines, "max_sentence_length": 1 << 16, "character_coverage": 0.9995}
    options = {"model_type": "bpe", "vocab_size": vocab_size, "num_threads": threads, "minloglevel": 2}
    try:
        sentencepiece.SentencePieceTrainer.train(model_writer=model, **corpus, **text, **pieces, **ids, **options)
    except RuntimeError as error:
        raise DataError(f"tokenizer.vocab_size ({vocab_size}) does not suit this text: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def encode_documents(
    tokenizer: Tokenizer, texts: list[str], *, add_bos: bool, add_eos: bool, special: bool = False
) -> list[np.ndarray]:
    """Return the ids of documents, uint32, with bos and eos if requested and in the vocabulary."""
    bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []
    before, after = np.array(bos, dtype=np.uint32), np.array(eos, dtype=np.uint32)
    return [np.concatenate([before, ids, after]) for ids in tokenizer.encode_many(texts, special=special)]
