"""Texts and records that are too long to hold: read once, and handed on in parts.

The long strings of such a record are laid aside on disk. What is left of it, in which a name stands for each of
them, is parsed by json as any record is: so keys, duplicates, sources and errors are those of the record itself.
"""

import codecs
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import xxhash

from corpus.documents import HALF_A_PAIR, Block, Document, from_record, is_plain, not_json, split_of, unreadable
from corpus.inputs import BadRecords
from corpus.rows import characters, fields, leaves, value
from data.config import DataConfig
from data.safe_split import cut
from data.tokenizer import PIECE_CHARS

LONG_STRING = 1 << 12  # characters, as it is written
READ_BYTES = 1 << 20
BROKEN = 16  # characters by which json says what is wrong with an escape
OUTSIDE = re.compile(r'[^"\[\]{},]*+')
INSIDE = re.compile(r'[^"\\]*+(?:\\(?:u[0-9A-Fa-f]{4}|[^u])[^"\\]*+)*+', re.DOTALL)


class UnreadableError(Exception):
    """What is wrong with a record, in words that its place goes before."""


class Aside:
    """Strings on disk, each known by a name that is the same for equal ones."""

    def __init__(self, file: Any) -> None:
        self.file, self.places = file, dict[str, tuple[int, int]]()
        self.prefix = secrets.token_hex(64)  # longer than a source's name may be: such a string is none either
        self.names = re.compile(f"({self.prefix}[0-9a-f]{{32}})")

    def add(self, pieces: Iterator[str]) -> str:
        """Write a string, and give its name; the halves of a surrogate pair may come in two pieces."""
        start, digest = self.file.seek(0, 2), xxhash.xxh3_128()
        join = codecs.getincrementaldecoder("utf-16-le")("surrogatepass")
        for piece in pieces:
            self._write(join.decode(piece.encode("utf-16-le", "surrogatepass")), digest)
        self._write(join.decode(b"", True), digest)
        name = self.prefix + digest.hexdigest()
        self.places[name] = (start, self.file.tell())
        return name

    def _write(self, text: str, digest: Any) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(raw)
        self.file.seek(0, 2)  # another string may have been read meanwhile
        self.file.write(raw)

    def read(self, name: str, errors: str = "strict") -> Iterator[str]:
        """Yield a string in pieces; raises `UnicodeDecodeError` at half a surrogate pair."""
        at, stop = self.places[name]
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        while at < stop:
            self.file.seek(at)
            raw = self.file.read(min(READ_BYTES, stop - at))
            at += len(raw)
            yield decoder.decode(raw, at == stop)

    def read_json(self, text: str) -> Iterator[str]:
        """Yield the JSON of a record that holds names, with the strings in their places."""
        for k, part in enumerate(self.names.split(text)):
            if k % 2:
                yield from (json.dumps(piece)[1:-1] for piece in self.read(part, "surrogatepass"))
            else:
                yield part


def scratch(config: DataConfig) -> IO[bytes]:
    """Open a file that nobody else sees: beside the corpus, where there is room; /tmp may be memory."""
    folder = Path(config.path).parent
    return tempfile.TemporaryFile(dir=folder if folder.is_dir() else None)


class Shortened:
    """A record's JSON, its long strings laid aside.

    Attributes:
        text: what is left of it, up to the first string that is none.
        rest: what was read beyond it.
    """

    def __init__(self, chunks: Iterator[str], aside: Aside, most: int, *, alone: bool) -> None:
        """Read a record of `chunks`, or with `alone` all of them; raises `UnreadableError` if over `most` is left."""
        self.chunks, self.aside, self.most = chunks, aside, most
        self.kept: list[str] = []
        self.size = 0
        self.gaps: list[tuple[int, int]] = []  # places in `text`, and how much longer the record is up to there
        self.rest, self.at = "", 0
        self._read(alone)
        self.text = "".join(self.kept)
        self.rest = self.rest[self.at :]

    def place(self, at: int) -> int:
        """Give the place in the record of a place in what is left."""
        return at + sum(more for gap, more in self.gaps if gap <= at)

    def _read(self, alone: bool) -> None:
        depth = 0
        while self.at < len(self.rest) or self._more():
            end = OUTSIDE.match(self.rest, self.at).end()  # type: ignore[union-attr]
            mark = self.rest[end : end + 1]
            over = not alone and depth == 0 and mark in [",", "]", "}"]  # after a number, say
            self._keep(self.rest[self.at : end + (not over)])
            self.at = end + (bool(mark) and not over)
            if over or (mark == '"' and not self._string()):
                return
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark, 0)
            if not alone and depth == 0 and mark in ['"', "]", "}"]:
                return

    def _string(self) -> bool:
        """Read a string from after its quote; say whether it has an end."""
        pieces, head = self._pieces(), ""
        for piece in pieces:
            head += piece
            if len(head) > LONG_STRING:
                self._lay_aside(chain([head], pieces))
                break
        else:
            self._keep(head)
        if self.rest[self.at : self.at + 1] != '"':
            self._keep(self.rest[self.at : self.at + BROKEN])
            return False
        self._keep('"')
        self.at += 1
        return True

    def _lay_aside(self, pieces: Iterator[str]) -> None:
        size, broken = 0, ""

        def unescaped() -> Iterator[str]:
            nonlocal size, broken
            for piece in pieces:
                try:
                    yield json.loads(f'"{piece}"')
                except json.JSONDecodeError as error:
                    size += error.pos - 1
                    broken = piece[error.pos - 1 : error.pos - 1 + BROKEN]
                    return
                size += len(piece)

        name = self.aside.add(unescaped())
        self._keep(name)
        self.gaps.append((self.size, size - len(name)))
        self._keep(broken)  # json will say of it what it would have said

    def _pieces(self) -> Iterator[str]:
        """Yield what is written up to a quote, or an escape that is none."""
        while True:
            end = INSIDE.match(self.rest, self.at).end()  # type: ignore[union-attr]
            piece, self.at = self.rest[self.at : end], end
            if piece:
                yield piece
            next_ones = self.rest[end : end + 6]
            if next_ones[:1] == '"' or len(next_ones) == 6 or not self._more():
                return

    def _more(self) -> bool:
        chunk = next(self.chunks, None)
        self.rest, self.at = self.rest[self.at :] + (chunk or ""), 0
        return chunk is not None

    def _keep(self, text: str) -> None:
        self.kept.append(text)
        self.size += len(text)
        if self.size > self.most:
            raise UnreadableError(_too_long(self.most))


def _too_long(most: int) -> str:
    return (
        f"a record of more than data.max_document_mb ({most >> 20}) MB, its strings of over {LONG_STRING} "
        "characters not counted"
    )


def long_line(
    raw: Iterator[bytes], block: Block, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield the blocks of a line, of which `block` says what it is and, as its path, where."""
    chunks, whole = decoded(raw), config.raw_json or is_plain(block, config)
    try:
        with scratch(config) as file:
            strings = Aside(file)
            line = strings.add(chunks if config.raw_json else _stripped(chunks)) if whole else None
            if is_plain(block, config):
                documents = [Document(str(line), block.source, block.path, split=block.split)]
            else:
                chunks = strings.read(line) if line else chunks
                found = Shortened(chunks, strings, config.max_document_mb << 20, alone=True)
                for _ in chunks:  # to the end of the line, which may be no UTF-8
                    pass
                documents = _parsed(found, block, config, bad, line)
            yield from _parts(documents, strings, block, config, bad, last_cut)
    except UnreadableError as error:
        bad.add(block.path, str(error))


def long_member(
    chunks: Iterator[str], block: Block, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Generator[Block, None, str]:
    """Yield the blocks of a member of a list, and return what was read after it.

    Raises `UnreadableError` if it is so bad that what comes after it cannot be found.
    """
    with scratch(config) as file:
        strings = Aside(file)
        found = Shortened(chunks, strings, config.max_document_mb << 20, alone=False)
        yield from _parts(_parsed(found, block, config, bad), strings, block, config, bad, last_cut)
        return found.rest


def long_row(
    row: dict[str, Any], n_bytes: int, block: Block, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield the blocks of a row of Arrow's cells that takes `n_bytes`; Python never holds a long string of it whole."""
    raws = map(characters, leaves(row.values()))
    most = config.max_document_mb << 20
    if n_bytes - sum(raw.size for raw in raws if raw is not None and raw.size > LONG_STRING) > most:
        bad.add(block.path, _too_long(most))
        return
    try:
        with scratch(config) as file:
            strings = Aside(file)
            documents = list(from_record(_shortened(row, strings), block.path, block, config, bad))
            yield from _parts(documents, strings, block, config, bad, last_cut)
    except (UnreadableError, ValueError) as error:
        bad.add(block.path, str(error) if isinstance(error, UnreadableError) else unreadable(error))


def _shortened(cells: dict[str, Any], strings: Aside) -> dict[str, Any]:
    """Give what cells hold, their long strings laid aside."""
    record = {}
    for name, cell in cells.items():
        raw, inside = characters(cell), fields(cell)
        if raw is not None and raw.size > LONG_STRING:
            pieces = (raw[at : at + READ_BYTES].to_pybytes() for at in range(0, raw.size, READ_BYTES))
            record[name] = strings.add(decoded(pieces, keep_mark=True))
        else:
            record[name] = value(cell) if inside is None else _shortened(inside, strings)
    return record


def _parsed(
    found: Shortened, block: Block, config: DataConfig, bad: BadRecords, line: str | None = None
) -> list[Document]:
    """Give the document of a record, if it has one; raises `UnreadableError` if it is no JSON."""
    if found.text.encode().isspace():
        return []
    try:
        record = json.loads(found.text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(not_json(error, found.place)) from None
    return list(from_record(record, block.path, block, config, bad, line=line))


def _parts(
    documents: list[Document],
    strings: Aside,
    block: Block,
    config: DataConfig,
    bad: BadRecords,
    last_cut: Callable[[str], int],
) -> Iterator[Block]:
    for document in documents:
        if document.text in strings.places:
            read = partial(strings.read, document.text)
        elif config.raw_json:
            read = partial(strings.read_json, document.text)
        else:
            yield replace(block, kind="documents", payload=[document])
            continue
        yield from long_text(document, read, config, bad, last_cut)


def long_text(
    document: Document,
    read: Callable[[], Iterator[str]],
    config: DataConfig,
    bad: BadRecords,
    last_cut: Callable[[str], int],
) -> Iterator[Block]:
    """Yield a text in parts; it is read twice, because its hash decides its split.

    `document` has all of it but the text. Raises `UnreadableError` as `read` does.
    """
    digest, blank = xxhash.xxh3_64(seed=config.valid_seed), True
    try:
        for text in read():
            digest.update(text.encode())
            blank = blank and not text.strip()
    except UnicodeDecodeError:
        bad.add(document.place, HALF_A_PAIR)
        return
    if blank:
        bad.empty += 1
        return
    whole = digest.intdigest()
    split = document.split or split_of(whole, config)
    begins, rest, least = True, "", PIECE_CHARS
    for text in chain(read(), [None]):
        rest += text or ""
        if text is not None and len(rest) <= least:
            continue
        *parts, rest = cut(rest, PIECE_CHARS, last_cut)
        least = max(PIECE_CHARS, 2 * len(rest))  # what has no place to be cut is not searched again and again
        for part in parts:
            yield Block("text", document.place, document.source, split, 0, part, begins, False, whole)
            begins = False
    yield Block("text", document.place, document.source, split, 0, rest, begins, True, whole)


def decoded(raw: Iterator[bytes], *, keep_mark: bool = False) -> Iterator[str]:
    """Yield text without a byte-order mark, unless that is kept; raises `UnreadableError` with the place."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    for number, chunk in enumerate(chain(raw, [b""])):
        if number == 0 and not keep_mark:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            raise UnreadableError(f"not UTF-8 at byte {done - kept + error.start}") from None
        done += len(chunk)
        if text:
            yield text


def _stripped(chunks: Iterator[str]) -> Iterator[str]:
    """Yield a text without the blanks at its ends."""
    begun, blanks = False, ""
    for text in chunks:
        text = blanks + text if begun else text.lstrip()
        begun = begun or bool(text)
        solid = text.rstrip()
        blanks = text[len(solid) :]
        yield solid
