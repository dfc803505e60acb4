"""One process' share of a corpus: its blocks, encoded and written in order, and its journal."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from corpus.config import MOST_SHARDS, Style, TokenizerConfig
from corpus.documents import Block
from corpus.encode import Encoded, encoded
from corpus.inputs import BadRecords, Item
from corpus.journal import Counts, Journal, stamp
from corpus.read import blocks
from data.config import DataConfig
from data.shards import ShardWriter, Written
from data.tokenizer import load_tokenizer


class Part:
    """One process' share of the work: its journal and its files."""

    def __init__(
        self, data: DataConfig, config: TokenizerConfig, folder: Path, shard: int, bad: BadRecords, *, generation: int
    ) -> None:
        self.data, self.config, self.folder, self.shard = data, config, folder, shard
        self.number = generation * MOST_SHARDS + shard
        self.path = folder / f"journal-{shard:03d}.json"
        self.journal = Journal.load(self.path) if self.path.exists() else Journal()
        self.bad = BadRecords(bad.policy, **self.journal.bad) if self.path.exists() else bad
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self._cut_back()
        self.writers = {group_of(stem): self._writer(stem, written) for stem, written in self.journal.open.items()}
        self.done_since: list[ShardWriter] = []
        self.unread = BadRecords(bad.policy)  # what could not be read since the last block that was
        self.whole = True  # everything that was begun has been written

    @property
    def has_written(self) -> bool:
        """Say whether there is anything of the corpus in its files."""
        return bool(self.writers or self.journal.closed)

    def _cut_back(self) -> None:
        """Remove the files that the journal does not know: they are of after its last entry."""
        for path in self.folder.glob(f"*/*-{self.number:05d}-*"):
            stem = f"{path.parent.name}/{path.name.split('.')[0]}"
            if (stem not in self.journal.open and stem not in self.journal.closed) or (
                stem in self.journal.open and path.suffix in (".idx", ".json")
            ):
                path.unlink()

    def _writer(self, stem: str, written: Written | None = None) -> ShardWriter:
        return ShardWriter(
            self.folder / stem,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer=self.tokenizer.fingerprint,
            masked=self.data.style is not Style.text,
            written=written,
        )

    def write(
        self,
        todo: list[Item],
        held_out: frozenset[int],
        shards: int,
        workers: int,
        on_progress: Callable[[Counts], None],
        save_every_s: float,
    ) -> None:
        """Encode and write what is left of this part."""
        if self.journal.complete:
            return
        places: deque[tuple[int, int, BadRecords]] = deque()  # of the blocks that are on their way
        found = encoded(
            self._blocks(todo, shards, places),
            self.data,
            self.config,
            self.folder / "tokenizer",
            held_out,
            workers=workers,
        )
        saved = time.monotonic()
        for block in found:
            item, number, bad = places.popleft()
            self.whole = False
            self.bad.merge(bad)  # it comes before the block
            self._add(block)
            self.journal.item, self.journal.block = item, number + 1
            self.whole = block.ends
            on_progress(self.journal.counts)
            if self.whole and time.monotonic() - saved >= save_every_s:
                self._save()
                saved = time.monotonic()
            if self.data.max_documents is not None and self.journal.counts.documents >= self.data.max_documents:
                break
        self.whole = False
        self.bad.merge(self.unread)
        for group in list(self.writers):
            self._finish(group)
        self.journal.complete = True
        self._save()

    def _blocks(self, todo: list[Item], shards: int, places: deque[tuple[int, int, BadRecords]]) -> Iterator[Block]:
        """Yield the blocks of this part from where the journal stands."""
        for place, (item, (first, step)) in enumerate(zip(todo, shares(todo, shards, self.shard), strict=True)):
            if first < 0 or place < self.journal.item:
                continue
            skip = self.journal.block if place == self.journal.item else 0
            if "://" not in item.path and item.dataset is None:
                self.journal.read[item.path] = stamp(item.path)
            whole = 0  # the number of the block that a document in parts began with: one part takes all of it
            found = blocks(item, self.data, self.unread, skip=skip, last_cut=self.tokenizer.last_cut)
            for number, block in enumerate(found, skip):
                whole = number if block.begins else whole
                if whole % step == first:
                    places.append((place, number, replace(self.unread)))
                    self.unread.clear()
                    yield block
                else:
                    self.unread.clear()  # another part tells it
            if first:
                self.unread.clear()

    def _add(self, block: Encoded) -> None:
        left = len(block.order)
        if self.data.max_documents is not None:
            left = self.data.max_documents - self.journal.counts.documents
        for key, group in block.groups.items():
            count = block.order[:left].count(key)
            if not count:
                continue
            lengths = group.lengths[:count]
            n_tokens, text_bytes = int(lengths.sum()), int(group.text_bytes[:count].sum())
            writer = self.writers.get(key) or self._next(key)
            writer.add_many(group.ids[:n_tokens], lengths, text_bytes, ends=block.ends)
            self.journal.counts.documents += count - (not block.ends)
            self.journal.counts.tokens += n_tokens
            self.journal.counts.text_bytes += text_bytes
            if writer.full:
                self._finish(key)
        self.bad.merge(block.bad)

    def _next(self, key: tuple[str, str]) -> ShardWriter:
        """Begin the next file of a split and source."""
        split, source = key
        before = sum(group_of(stem) == key for stem in self.journal.closed)
        self.writers[key] = self._writer(f"{split}/{source}-{self.number:05d}-{before:05d}")
        return self.writers[key]

    def _finish(self, key: tuple[str, str]) -> None:
        writer = self.writers.pop(key)
        writer.close()
        self.journal.closed.append(f"{key[0]}/{writer.stem.name}")
        self.done_since.append(writer)

    def _save(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        self.journal.open = {f"{w.stem.parent.name}/{w.stem.name}": w.written for w in self.writers.values()}
        self.journal.bad = self.bad.as_json()
        self.journal.save(self.path)
        for writer in self.done_since:
            writer.forget()
        self.done_since = []

    def save_if_whole(self) -> None:
        """Keep what has been done, unless it was interrupted in the middle of a block."""
        if self.whole:
            self._save()

    def close_files(self) -> None:
        for writer in self.writers.values():
            writer.close_files()


def shares(todo: list[Item], shards: int, shard: int) -> list[tuple[int, int]]:
    """Give for each item which of its blocks a part takes: (first, step), and (-1, 1) for none.

    Each part has an equal share of all bytes or records, laid end to end. Parts that meet in an item each
    read it and take their turn of its blocks, because what is compressed can only be read from its beginning.
    """
    sizes = [max(1, item.size or (len(item.dataset) if hasattr(item.dataset, "__len__") else 0)) for item in todo]
    total, end, found = sum(sizes), 0, []
    for size in sizes:
        parts = range(end * shards // total, ((end + size) * shards - 1) // total + 1)
        found.append((shard - parts.start, len(parts)) if shard in parts else (-1, 1))
        end += size
    return found


def group_of(stem: str) -> tuple[str, str]:
    """Give the split and the source of a file, from `split/source-part-number`."""
    split, name = stem.split("/")
    return split, name.rsplit("-", 2)[0]
