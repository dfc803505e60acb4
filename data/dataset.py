"""A prepared corpus, opened for training: its sources, its packs, its order."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from corpus.config import DataError, Source
from data.about import read_about, refuse_small_vocabulary, refuse_unknown_sources
from data.batches import Batch, collate
from data.config import DataConfig, Packing, refuse_missing
from data.external_formats import refuse_overlap, token_files
from data.packing import Layout, Piece, RandomTokens, Tokens, layout_of
from data.sampler import Mixture, Pool
from data.shards import Shard
from data.tokenizer import Tokenizer, load_tokenizer

RANDOM_PACKS = {"train": 4096, "valid": 8}


class PackedDataset:
    """The packs of one split, a layout for each source.

    Sample i of the endless sequence is a pure function of the seed and i: without a mixture all packs are
    shuffled together, and with one each source's packs are, and the sources take turns.
    """

    def __init__(
        self,
        layouts: list[Layout],
        sources: list[int],
        config: DataConfig,
        *,
        vocab_size: int,
        weights: list[float] | None = None,
    ) -> None:
        self.layouts, self.sources, self.config, self.vocab_size = layouts, np.array(sources), config, vocab_size
        self.limits = np.cumsum([0, *(layout.n_packs for layout in layouts)])
        self.n_packs = int(self.limits[-1])
        self.mixture = None if weights is None else Mixture(weights)
        self.first_sample = 0
        self.pools: dict[int, Pool] = {}

    def begin_at(self, sample: int) -> None:
        """Begin the sequence anew at a sample: what came before was of a corpus without the files added since."""
        self.first_sample, self.pools = sample, {}

    def _pool(self, number: int) -> Pool:
        """Give the packs of a layout, or with -1 of all, shuffled."""
        if number not in self.pools:
            n_packs = self.n_packs if number < 0 else self.layouts[number].n_packs
            source = -1 if number < 0 else int(self.sources[number])
            self.pools[number] = Pool(n_packs, self.config.seed, self.first_sample, source + 1)
        return self.pools[number]

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Give the packs of some samples by their place in the corpus; int64 (N,) to int64 (N,)."""
        samples = samples - self.first_sample
        if self.mixture is None:
            return self._pool(-1).packs(samples)
        numbers, draws = self.mixture.draws(samples)
        found = np.empty_like(samples)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._pool(number).packs(draws[here]) + self.limits[number]
        return found

    def numbers_of(self, packs: np.ndarray) -> np.ndarray:
        """Give the layouts that packs lie in; int64 (N,) to int64 (N,)."""
        return np.searchsorted(self.limits, packs, side="right") - 1

    def batch(self, packs: np.ndarray) -> Batch:
        """Read packs by their place in the corpus; raises `DataError` on a token outside the vocabulary."""
        numbers = self.numbers_of(packs)
        within = packs - self.limits[numbers]
        order = np.argsort(numbers, kind="stable")
        found = [self.layouts[n].rows(within[order][numbers[order] == n]) for n in np.unique(numbers).tolist()]
        rows = found[0] if len(found) == 1 else found[0].joined(found[1:], order)
        if rows.tokens.view(np.uint32).max() >= self.vocab_size:  # a negative one is larger still
            self._refuse(rows.tokens, packs)
        isolated = self.config.packing is not Packing.internlm_one
        return collate(rows, self.sources[numbers], seq_len=self.config.seq_len, isolated=isolated)

    def pieces(self, pack: int) -> list[Piece]:
        """Give the parts of documents in a pack."""
        number = int(np.searchsorted(self.limits, pack, side="right")) - 1
        return self.layouts[number].pieces(pack - int(self.limits[number]))

    def source_of(self, pack: int) -> int:
        return int(self.sources[int(np.searchsorted(self.limits, pack, side="right")) - 1])

    def _refuse(self, tokens: np.ndarray, packs: np.ndarray) -> None:
        row, at = np.argwhere((tokens >= self.vocab_size) | (tokens < 0))[0].tolist()
        wrong, where = int(tokens[row, at]), ""
        for piece in self.pieces(int(packs[row])):
            if at < piece.length:
                offset = piece.start + at
                document = int(np.searchsorted(piece.file.all_offsets(), offset, side="right")) - 1
                where = f"{piece.file.stem}.bin: token {offset}, in document {document}, "
                break
            at -= piece.length
        raise DataError(
            f"{where}is id {wrong}, outside model.vocab_size ({self.vocab_size}): the file is damaged, or was made "
            "with another tokenizer"
        )

    def epochs(self, samples: int) -> dict[int, float]:
        """Give how often each source has been seen after so many samples."""
        drawn = samples - self.first_sample
        if self.mixture is None:
            return {int(source): drawn / max(1, self.n_packs) for source in self.sources}
        counts = self.mixture.drawn(drawn)
        return {
            int(source): int(count) / max(1, layout.n_packs)
            for source, count, layout in zip(self.sources, counts, self.layouts, strict=True)
        }

    def waste(self) -> tuple[float, float]:
        """Give the share of tokens that is padding and the share of documents that is cut."""
        if not self.n_packs:
            return 0.0, 0.0
        shares = np.array([layout.waste() for layout in self.layouts])
        padding, cut = np.average(shares, axis=0, weights=[layout.n_packs for layout in self.layouts])
        return float(padding), float(cut)


@dataclass(slots=True)
class Corpus:
    sources: tuple[str, ...]
    fingerprints: list[str]  # the hash of each file of tokens; with the tokenizer they are what a run was trained on
    tokenizer: Tokenizer | None  # None for random tokens
    add_bos: bool
    add_eos: bool
    bytes_per_token: np.ndarray | None  # int32 (V,)
    train: PackedDataset
    valid: PackedDataset

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(self.fingerprints).encode())


def open_corpus(config: DataConfig, *, vocab_size: int) -> Corpus:
    """Open what prepare_data.py wrote for a model of `vocab_size`; raises `DataError` on anything amiss."""
    refuse_missing(config)
    match config.source:
        case Source.random:
            return _random_corpus(config, vocab_size)
        case Source.tokens:
            return _foreign_corpus(config, vocab_size)
        case _:
            return _prepared_corpus(config, vocab_size)


def _prepared_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    folder = Path(config.path)
    about = read_about(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != about["tokenizer"]["fingerprint"]:
        raise DataError(f"{tokenizer.path} is not the tokenizer that {folder} was made with; prepare the corpus again")
    refuse_small_vocabulary(str(tokenizer.path), tokenizer.vocab_size, vocab_size)
    files: dict[str, dict[str, list[Shard]]] = {"train": {}, "valid": {}}
    for split, sources in about["splits"].items():
        for source, counts in sources.items():
            files[split][source] = [_own_shard(folder / stem, tokenizer, vocab_size) for stem in counts["shards"]]
    return _corpus(
        config,
        files,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        add_bos=about["tokenizer"]["add_bos"],
        add_eos=about["tokenizer"]["add_eos"],
    )


def _own_shard(stem: Path, tokenizer: Tokenizer, vocab_size: int) -> Shard:
    if not Path(f"{stem}.json").exists():
        raise DataError(f"{stem}.json is missing, so the shard beside it is not complete; prepare the corpus again")
    shard = Shard(stem)
    assert shard.header is not None
    if shard.header.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{stem}.bin was written with another tokenizer than {tokenizer.path}; prepare the corpus again"
        )
    if shard.header.max_token >= vocab_size:
        raise DataError(
            f"{stem}.bin holds token {shard.header.max_token}, outside model.vocab_size ({vocab_size}); prepare the "
            "corpus again, or pass a larger model.vocab_size"
        )
    return shard


def _foreign_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    assert config.input is not None
    train = token_files(Path(config.input), config.name)
    valid = token_files(Path(config.valid_input), config.name) if config.valid_input else {}
    refuse_overlap(train, valid, config.input, config.valid_input or "")
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if tokenizer is not None:
        refuse_small_vocabulary(str(tokenizer.path), tokenizer.vocab_size, vocab_size)
    files: Any = {"train": train, "valid": valid}
    return _corpus(config, files, tokenizer=tokenizer, vocab_size=vocab_size, add_bos=False, add_eos=False)


def _corpus(
    config: DataConfig,
    files: dict[str, Any],
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    add_bos: bool,
    add_eos: bool,
) -> Corpus:
    sources = tuple(sorted({name for split in files.values() for name in split}))
    refuse_unknown_sources(config, set(files["train"]))
    fingerprints = ["tokenizer/" + (tokenizer.fingerprint if tokenizer else "unknown") + f"/{add_bos}/{add_eos}"]
    for split in ("train", "valid"):
        for name in sorted(files[split]):
            fingerprints += [f"{split}/{name}/{file.fingerprint()}" for file in files[split][name]]
    make = partial(_packs, config, sources, vocab_size=vocab_size)
    train, valid = make(files["train"], train=True), make(files["valid"], train=False)
    if not train.n_packs:
        n_tokens = sum(file.n_tokens for found in files["train"].values() for file in found)
        raise DataError(
            f"{config.input if config.source is Source.tokens else config.path} has {n_tokens} training tokens, and "
            f"none of its sources fills one pack of {config.pack_tokens}; lower data.seq_len or add text"
        )
    return Corpus(
        sources=sources,
        fingerprints=fingerprints,
        tokenizer=tokenizer,
        add_bos=add_bos,
        add_eos=add_eos,
        bytes_per_token=None if tokenizer is None else _padded(tokenizer.token_bytes(), vocab_size),
        train=train,
        valid=valid,
    )


def _packs(
    config: DataConfig, sources: tuple[str, ...], files: dict[str, list[Tokens]], *, vocab_size: int, train: bool
) -> PackedDataset:
    names = sorted(files)
    if train and config.mix:
        names = [name for name in names if config.mix.get(name, 0) > 0]
    packing, pack_len = config.packing, config.pack_tokens
    layouts = [layout_of(files[name], packing, pack_len, seed=config.seed, train=train) for name in names]
    weights = None
    if train and config.mix:
        weights = [config.mix[name] for name in names]
        for name, layout in zip(names, layouts, strict=True):
            if not layout.n_packs:
                raise DataError(
                    f"data.mix.{name} ({config.mix[name]}): the source does not fill one pack of {pack_len}"
                )
    return PackedDataset(
        layouts, [sources.index(name) for name in names], config, vocab_size=vocab_size, weights=weights
    )


def _padded(lengths: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([lengths, np.zeros(size - len(lengths), dtype=lengths.dtype)])


def _random_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    def packs(split: str, offset: int) -> PackedDataset:
        layout = RandomTokens(
            vocab_size=config.vocab_size,
            pack_len=config.pack_tokens,
            seq_len=config.seq_len,
            seed=config.seed + offset,
            n_packs=RANDOM_PACKS[split],
        )
        return PackedDataset([layout], [0], config, vocab_size=vocab_size)

    return Corpus(
        sources=("random",),
        fingerprints=[f"random-{config.vocab_size}-{config.seed}"],
        tokenizer=None,
        add_bos=False,
        add_eos=False,
        bytes_per_token=None,
        train=packs("train", 0),
        valid=packs("valid", 1),
    )
