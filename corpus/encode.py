"""Blocks of text to ids, by as many processes as there are cores, in the order of the blocks."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from corpus.chat import ChatEncoder, read_template
from corpus.config import DataError, Style, TokenizerConfig
from corpus.documents import Block, Document, digest_of, documents
from corpus.inputs import BadRecords
from data.config import DataConfig
from data.shards import LOSS_MASKED
from data.tokenizer import Tokenizer, encode_documents, load_tokenizer


@dataclass(slots=True)
class Group:
    """Documents of one split and source in a block, end to end."""

    ids: np.ndarray  # uint32
    lengths: np.ndarray  # int64, tokens of each document
    text_bytes: np.ndarray  # int64, of each document


@dataclass(slots=True)
class Encoded:
    """A block, encoded.

    Attributes:
        groups: by split and source.
        order: the group of each document, so that the first n of a block can be taken.
        ends: whether the last document ends here.
    """

    bad: BadRecords
    groups: dict[tuple[str, str], Group] = field(default_factory=dict)
    order: list[tuple[str, str]] = field(default_factory=list)
    ends: bool = True


class BlockEncoder:
    """Makes ids of blocks.

    Attributes:
        held_out: hashes of documents that are validation, and so no training documents.
    """

    def __init__(self, data: DataConfig, config: TokenizerConfig, tokenizer: Path, held_out: frozenset[int]) -> None:
        self.data, self.config, self.held_out = data, config, held_out
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer)
        chat = data.style is not Style.text
        self.chat = ChatEncoder(read_template(data.chat_template), self.tokenizer) if chat else None
        self.token_bytes = self.tokenizer.token_bytes() if chat else None

    def __call__(self, block: Block) -> Encoded:
        result = Encoded(BadRecords(self.data.on_bad_record), ends=block.ends)
        found = [
            document for document in documents(block, self.data, result.bad) if self._allowed(document, result.bad)
        ]
        by_group: dict[tuple[str, str], list[tuple[np.ndarray, int]]] = {}
        for document, ids in zip(found, self._ids(found, block, result.bad), strict=True):
            if ids is None:
                continue
            assert document.split is not None
            group = (document.split, document.source)
            result.order.append(group)
            by_group.setdefault(group, []).append((ids, self._text_bytes(document, ids)))
        for group, parts in by_group.items():
            lengths, sizes = (
                np.array(values, dtype=np.int64) for values in zip(*[(len(i), n) for i, n in parts], strict=True)
            )
            result.groups[group] = Group(np.concatenate([ids for ids, _ in parts]), lengths, sizes)
        return result

    def _text_bytes(self, document: Document, ids: np.ndarray) -> int:
        """Count the bytes of a document's text; of a conversation, those that its template writes."""
        if self.token_bytes is None:
            return len(document.text.encode())
        return int(self.token_bytes[ids & ~np.uint32(LOSS_MASKED)].sum())

    def _allowed(self, document: Document, bad: BadRecords) -> bool:
        if document.split == "train" and self.held_out and digest_of(document, self.data) in self.held_out:
            if document.begins:
                bad.add(document.place, "is in the validation split as well, so it is not trained on")
            return False
        return True

    def _ids(self, found: list[Document], block: Block, bad: BadRecords) -> Sequence[np.ndarray | None]:
        if self.chat is not None:
            return [self._conversation(document, bad) for document in found]
        return encode_documents(
            self.tokenizer,
            [document.text for document in found],
            add_bos=self.config.add_bos,
            add_eos=self.config.add_eos,
            begins=block.begins,
            ends=block.ends,
        )

    def _conversation(self, document: Document, bad: BadRecords) -> np.ndarray | None:
        """Give a conversation's ids, those that are not to be learnt with the highest bit set.

        A bos or eos that the template writes itself is not added again.
        """
        assert self.chat is not None
        try:
            ids, learnt = self.chat.encode(document.messages or [])
        except ValueError as error:
            bad.add(document.place, str(error))
            return None
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if self.config.add_bos and bos is not None and ids[0] != bos:
            ids, learnt = np.insert(ids, 0, bos), np.insert(learnt, 0, False)
        if self.config.add_eos and eos is not None and ids[-1] != eos:
            ids, learnt = np.append(ids, eos), np.append(learnt, True)
        return np.where(learnt, ids, ids | np.uint32(LOSS_MASKED)).astype(np.uint32)


_encoder: list[BlockEncoder] = []  # a worker's own


def _start_worker(arguments: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker a core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends them
    Thread(target=_end_with_the_main_process, daemon=True).start()
    _encoder[:] = [BlockEncoder(*arguments)]


def _end_with_the_main_process() -> None:
    main = parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _encode(block: Block) -> Encoded:
    return _encoder[0](block)


def encoded(
    found: Iterable[Block],
    data: DataConfig,
    config: TokenizerConfig,
    tokenizer: Path,
    held_out: frozenset[int],
    *,
    workers: int,
) -> Iterator[Encoded]:
    """Yield blocks in order, encoded by `workers` processes a little ahead; by this one if it is one."""
    arguments = (data, config, tokenizer, held_out)
    if workers == 1:
        yield from map(BlockEncoder(*arguments), found)
        return
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (arguments,)) as pool:
            yield from _ahead(found, lambda block: pool.submit(_encode, block), 2 * workers)
    except BrokenProcessPool:
        raise DataError(
            f"one of the {workers} processes that encode was killed, which the system does when memory runs out; "
            "run the same again to go on, with fewer workers if it was that"
        ) from None


def _ahead(found: Iterable[Block], submit: Callable[[Block], Future[Encoded]], n_waiting: int) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    try:
        for block in found:
            waiting.append(submit(block))
            if len(waiting) > n_waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
