"""The documents of a corpus, one after another in this process: to train a tokenizer, and to know what is held out."""

import math
from collections.abc import Callable, Iterator

import xxhash

from corpus.config import DataError, OnBadRecord
from corpus.documents import Document, digest_of, documents
from corpus.inputs import BadRecords, Item, items
from corpus.read import blocks
from data.config import DataConfig

SAMPLED_FROM = 32  # times the text of a tokenizer is what it is drawn from
LEAST_SAMPLE = 1 << 20  # characters of each file


def all_documents(data: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of a corpus, each with its split."""
    yield from documents_of(items(data, bad), data, bad)


def documents_of(
    found: list[Item], data: DataConfig, bad: BadRecords, *, most: Callable[[Item], float] = lambda item: math.inf
) -> Iterator[Document]:
    """Yield the documents of some items, of each about the first `most` characters."""
    number = 0
    for item in found:
        size, limit = 0, most(item)
        for block in blocks(item, data, bad):
            for document in documents(block, data, bad):
                if data.max_documents is not None and number >= data.max_documents:
                    return
                number, size = number + 1, size + len(document.text)
                yield document
            if size >= limit:
                break


def held_out_digests(data: DataConfig, everything: list[Item]) -> frozenset[int]:
    """Hash what is held out whole, so that no training document is also one of validation.

    Where documents are held out by their hash, equal ones are on the same side without this.
    """
    quiet = BadRecords(OnBadRecord.skip)
    held_out = (item for item in everything if item.split == "valid")
    found = (
        document
        for item in held_out
        for block in blocks(item, data, quiet)
        for document in documents(block, data, quiet)
    )
    return frozenset(digest_of(document, data) for document in found if document.begins)


def tokenizer_texts(data: DataConfig, todo: list[Item], limit: int) -> list[str]:
    """Give about `limit` bytes of training text: all of it, or documents taken evenly by their hash.

    Of a corpus much larger than that only the beginning of each file is read. Bad records that are left out are told
    when the text is encoded, not here.
    """
    total, enough = sum(item.size for item in todo), SAMPLED_FROM * limit

    def most(item: Item) -> float:
        if total <= enough:
            return enough if item.dataset is not None else math.inf
        return max(enough * item.size / total, LEAST_SAMPLE)

    kept: list[tuple[int, str]] = []
    share, size, bad = 1 << 64, 0, BadRecords(data.on_bad_record)
    for document in documents_of(todo, data, bad, most=most):
        digest = xxhash.xxh3_64_intdigest(document.text.encode(), seed=1)
        if document.split == "train" and digest < share:
            kept.append((digest, document.text))
            size += len(document.text.encode())
        while size > 2 * limit and len(kept) > 1:
            share //= 2
            kept = [(digest, text) for digest, text in kept if digest < share]
            size = sum(len(text.encode()) for _, text in kept)
    share = int(share * min(1.0, limit / max(1, size)))
    if not kept:
        why = f": {bad.count} bad records were left out, the first {bad.places[0]}" if bad.count else ""
        raise DataError(f"there is no training text in data.source ({data.source.value}){why}")
    return [text for digest, text in kept if digest < share or len(kept) == 1]
