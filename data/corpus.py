"""A prepared corpus, opened for training: its sources, its packs, its order."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.config import DataConfig, DataError, Source
from data.packing import Pack, PackedStream, RandomStream
from data.shards import Shard
from data.tokenizer import Tokenizer, load_tokenizer

RANDOM_PACKS = {"train": 4096, "valid": 8}


class PackSet:
    """The packs of one split over all sources, in corpus order or shuffled without end.

    Sample i is a pure function of the seed and i: epoch e is the e-th shuffle of one
    `numpy.random.RandomState(seed)`, as InternLM's `StaticBatchSampler` draws them.
    """

    def __init__(self, streams: list[PackedStream | RandomStream], *, seed: int, padded: bool) -> None:
        self.streams, self.seed = streams, seed
        self.ends = np.cumsum([stream.n_packs(padded=padded) for stream in streams], dtype=np.int64)
        self.n_packs = int(self.ends[-1]) if len(self.ends) else 0
        self._restart()

    def _restart(self) -> None:
        self.epoch = -1
        self.random = np.random.RandomState(self.seed)
        self.order = np.zeros(0, dtype=np.int64)

    def in_order(self, index: int) -> Pack:
        """Give a pack by its place in the corpus."""
        stream = int(np.searchsorted(self.ends, index, side="right"))
        return self.streams[stream].pack(index - (int(self.ends[stream - 1]) if stream else 0))

    def sample(self, index: int) -> Pack:
        """Give sample `index` of the endless shuffled sequence."""
        epoch, place = divmod(index, self.n_packs)
        if epoch < self.epoch:
            self._restart()
        while self.epoch < epoch:
            self.order = np.arange(self.n_packs)
            self.random.shuffle(self.order)
            self.epoch += 1
        return self.in_order(int(self.order[place]))


@dataclass(slots=True)
class Corpus:
    sources: tuple[str, ...]
    fingerprint: str  # of the tokens, the tokenizer, and all that decides what a sample holds
    tokenizer: Tokenizer | None  # None for random tokens
    add_bos: bool
    add_eos: bool
    bytes_per_token: np.ndarray | None  # int32 (V,)
    vocab_size: int
    train: PackSet
    valid: PackSet


def open_corpus(config: DataConfig, *, vocab_size: int) -> Corpus:
    """Open what prepare_data.py wrote for a model of `vocab_size`; raises `DataError` on anything amiss."""
    if config.source is Source.random:
        return _random_corpus(config, vocab_size)
    folder = Path(config.path)
    if not (folder / "corpus.json").exists():
        raise DataError(f"there is no prepared data in {folder}; run: python prepare_data.py data={config.name}")
    about = read_about(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != about["tokenizer"]["fingerprint"]:
        raise DataError(f"{tokenizer.path} is not the tokenizer that {folder} was made with; prepare the corpus again")
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} pieces, more than model.vocab_size ({vocab_size}); "
            f"pass model.vocab_size={-(-tokenizer.vocab_size // 128) * 128}"
        )
    sources = tuple(sorted({name for split in about["splits"].values() for name in split}))
    digest = xxhash.xxh3_128(json.dumps(about["tokenizer"], sort_keys=True).encode())
    sets = {}
    for split in ("train", "valid"):
        streams: list[PackedStream | RandomStream] = []
        for name in sorted(about["splits"].get(split, {})):
            shard = Shard(folder / split / name)
            _check_shard(shard, tokenizer, vocab_size)
            digest.update(f"{split}/{name}/{shard.header.bin_hash}/{shard.header.idx_hash}".encode())
            order = np.arange(shard.header.documents)
            if split == "train":
                np.random.RandomState(config.seed).shuffle(order)
            streams.append(
                PackedStream(
                    shard,
                    pack_len=config.pack_tokens,
                    seq_len=config.seq_len,
                    packing=config.packing,
                    order=order,
                    source=sources.index(name),
                )
            )
        sets[split] = PackSet(streams, seed=config.seed, padded=split == "valid")
    if not sets["train"].n_packs:
        n_tokens = sum(stream.n_tokens for stream in sets["train"].streams)
        raise DataError(
            f"{folder} has {n_tokens} training tokens, and none of its sources fills one pack of "
            f"{config.pack_tokens}; lower data.seq_len or add text"
        )
    return Corpus(
        sources=sources,
        fingerprint=digest.hexdigest(),
        tokenizer=tokenizer,
        add_bos=about["tokenizer"]["add_bos"],
        add_eos=about["tokenizer"]["add_eos"],
        bytes_per_token=_padded(tokenizer.token_bytes(), vocab_size),
        vocab_size=vocab_size,
        train=sets["train"],
        valid=sets["valid"],
    )


def read_about(folder: Path) -> dict[str, Any]:
    """Read what a prepared corpus says of itself."""
    path = folder / "corpus.json"
    try:
        about = json.loads(path.read_text())
        _ = about["splits"], about["tokenizer"]["fingerprint"], about["made_by"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not describe a corpus ({error}); prepare it again") from None
    return about


def _check_shard(shard: Shard, tokenizer: Tokenizer, vocab_size: int) -> None:
    header = shard.header
    if header.tokenizer != tokenizer.fingerprint:
        raise DataError(f"{shard.stem}.bin was written with another tokenizer than {tokenizer.path}")
    if header.max_token >= vocab_size:
        raise DataError(f"{shard.stem}.bin holds token {header.max_token}, outside model.vocab_size ({vocab_size})")


def _padded(lengths: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([lengths, np.zeros(size - len(lengths), dtype=lengths.dtype)])


def _random_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    def packs(split: str, offset: int) -> PackSet:
        stream = RandomStream(
            vocab_size=config.vocab_size,
            pack_len=config.pack_tokens,
            seq_len=config.seq_len,
            seed=config.seed + offset,
            n_packs=RANDOM_PACKS[split],
        )
        return PackSet([stream], seed=config.seed, padded=split == "valid")

    return Corpus(
        sources=("random",),
        fingerprint=f"random-{config.vocab_size}-{config.seed}",
        tokenizer=None,
        add_bos=False,
        add_eos=False,
        bytes_per_token=None,
        vocab_size=vocab_size,
        train=packs("train", 0),
        valid=packs("valid", 1),
    )
