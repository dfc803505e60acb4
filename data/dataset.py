"""A corpus opened for training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from corpus.config import DataError, Source, as_paths
from data.batches import Batch, collate
from data.config import DataConfig
from data.external_formats import check_no_overlap, token_files
from data.manifest import check_exists, check_vocab_size, mix_weights, read_manifest
from data.packing import Concat, Packing, Pieces, RandomTokens, find_packing, read_rows
from data.sampler import Mixture, Pool
from data.shards import Shard, TokenFile
from data.tokenizer import Tokenizer, load_tokenizer

RANDOM_PACKS = {"train": 4096, "valid": 8}
Split = Mapping[str, Sequence[TokenFile]]  # files by source


class PackedDataset:
    """The packs of one split, with one packing per source number.

    Sample i of the endless sequence is a pure function of seed and i. Without a mixture all packs are shuffled
    together; with one, each source is shuffled separately and the sources alternate by weight.
    """

    def __init__(
        self, packings: dict[int, Packing], config: DataConfig, vocab_size: int, weights: Sequence[float] = ()
    ) -> None:
        self.sources, self.packings = np.array([*packings], dtype=np.int64), [*packings.values()]
        self.config, self.vocab_size = config, vocab_size
        self.files = [file for packing in self.packings for file in packing.files]
        self.first_file = np.cumsum([0, *(len(packing.files) for packing in self.packings)])
        self.limits = np.cumsum([0, *(packing.n_packs for packing in self.packings)])
        self.n_packs = int(self.limits[-1])
        self.isolated = find_packing(config.packing).isolated
        self.mixture = Mixture(weights) if weights else None
        self.first_sample = 0
        self.pools: dict[int, Pool] = {}

    def begin_at(self, sample: int) -> None:
        """Restart the sequence at a sample, because files have been added to the corpus since the samples before it."""
        self.first_sample, self.pools = sample, {}

    def _pool(self, number: int) -> Pool:
        """Return the shuffled packs of a packing; -1: of all packings."""
        if number not in self.pools:
            n_packs = self.n_packs if number < 0 else self.packings[number].n_packs
            source = -1 if number < 0 else int(self.sources[number])
            self.pools[number] = Pool(n_packs, self.config.seed, self.first_sample, source + 1)
        return self.pools[number]

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """Return the pack index of each sample; int64 (N,) to int64 (N,)."""
        samples = samples - self.first_sample
        if self.mixture is None:
            return self._pool(-1).packs(samples)
        numbers, draws = self.mixture.draws(samples)
        found = np.empty_like(samples)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._pool(number).packs(draws[here]) + self.limits[number]
        return found

    def source_of(self, packs: np.ndarray) -> np.ndarray:
        """Return the sources of packs; int64 (N,) to int64 (N,)."""
        return self.sources[np.searchsorted(self.limits, packs, side="right") - 1]

    def pieces(self, packs: np.ndarray) -> Pieces:
        """Return the pieces of packs; `files` indexes `self.files`."""

        def of_packing(number: int, packs: np.ndarray) -> Pieces:
            found = self.packings[number].pieces(packs)
            return found._replace(files=found.files + self.first_file[number])

        return Pieces.gathered(packs, self.limits, of_packing)

    def batch(self, packs: np.ndarray) -> Batch:
        """Read packs by index; raise `DataError` on a token outside the vocabulary."""
        pieces = self.pieces(packs)
        rows = read_rows(self.files, pieces, self.config.pack_tokens, self.config.seq_len)
        if rows.tokens.view(np.uint32).max() >= self.vocab_size:  # negative ids are large as uint32
            raise self._wrong_token(rows.tokens, pieces)
        return collate(rows, self.source_of(packs), seq_len=self.config.seq_len, isolated=self.isolated)

    def _wrong_token(self, tokens: np.ndarray, pieces: Pieces) -> DataError:
        row, at = np.argwhere(tokens.view(np.uint32) >= self.vocab_size)[0].tolist()
        of_row = np.flatnonzero(np.repeat(np.arange(len(tokens)), pieces.n_pieces) == row)
        begins = np.cumsum(pieces.lengths[of_row]) - pieces.lengths[of_row]
        number = np.searchsorted(begins, at, side="right") - 1
        piece, place = of_row[number], pieces.starts[of_row[number]] + at - begins[number]
        what = f"{self.files[pieces.files[piece]].stem}.bin: token {place} is id {tokens[row, at]}"
        return DataError(f"{what}, outside model.vocab_size ({self.vocab_size}); prepare it with the right tokenizer")

    def epochs(self, samples: int) -> dict[int, float]:
        """Return the epochs of each source after `samples` samples."""
        drawn = samples - self.first_sample
        sources = self.sources.tolist()
        if self.mixture is None:
            return dict.fromkeys(sources, drawn / max(1, self.n_packs))
        found = zip(sources, self.mixture.drawn(drawn).tolist(), self.packings, strict=True)
        return {source: count / max(1, packing.n_packs) for source, count, packing in found}


@dataclass(slots=True)
class Corpus:
    sources: tuple[str, ...]
    fingerprints: list[str]  # of the tokenizer and of each token file
    tokenizer: Tokenizer | None  # None for random tokens
    add_bos: bool
    add_eos: bool
    bytes_per_token: np.ndarray | None  # int32 (V,)
    train: PackedDataset
    valid: PackedDataset

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(self.fingerprints).encode())

    def verify(self, part: int, parts: int) -> None:
        """Check the hashes of every `parts`-th file from `part` on; raise `DataError` if one is damaged."""
        for file in [*self.train.files, *self.valid.files][part::parts]:
            if isinstance(file, Shard):
                Shard(file.stem, verify=True)


def open_corpus(config: DataConfig, *, vocab_size: int) -> Corpus:
    """Open a corpus for a model of `vocab_size`; raise `DataError` if it is missing, damaged or does not fit."""
    check_exists(config)
    tokenizer, add_bos, add_eos = None, False, False
    match config.source:
        case Source.random:
            n_tokens = [n_packs * config.pack_tokens for n_packs in RANDOM_PACKS.values()]
            size, documents = min(vocab_size, config.vocab_size), config.seq_len
            files = [RandomTokens(size, n, documents, config.seed + split) for split, n in enumerate(n_tokens)]
            train, valid = ({"random": [file]} for file in files)
        case Source.tokens:
            train, valid = (token_files(as_paths(paths), config.name) for paths in (config.input, config.valid_input))
            check_no_overlap(train, valid)
            tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
        case _:
            folder = Path(config.path)
            manifest = read_manifest(folder)
            tokenizer = load_tokenizer(folder / "tokenizer")
            add_bos, add_eos = manifest["tokenizer"]["add_bos"], manifest["tokenizer"]["add_eos"]
            if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
                raise DataError(f"{tokenizer.path} is not the tokenizer of {folder}; prepare the corpus again")
            train, valid = (_shards(folder, manifest["splits"].get(split, {}), tokenizer) for split in RANDOM_PACKS)
    if tokenizer is not None:
        check_vocab_size(str(tokenizer.path), tokenizer.vocab_size, vocab_size)
    config = replace(config, mix=mix_weights(config, set(train)))
    sources = tuple(sorted({*train, *valid}))
    fingerprints = [f"tokenizer/{tokenizer.fingerprint if tokenizer else 'unknown'}/{add_bos}/{add_eos}"]
    for split, files in (("train", train), ("valid", valid)):
        fingerprints += [f"{split}/{name}/{file.fingerprint()}" for name in sorted(files) for file in files[name]]
    bytes_per_token = None
    if tokenizer is not None:
        bytes_per_token = np.zeros(vocab_size, dtype=np.int32)
        bytes_per_token[: tokenizer.vocab_size] = tokenizer.token_bytes()
    packs = (_packs(config, files, sources, vocab_size, train=files is train) for files in (train, valid))
    return Corpus(sources, fingerprints, tokenizer, add_bos, add_eos, bytes_per_token, *packs)


def _shards(folder: Path, sources: dict[str, dict[str, Any]], tokenizer: Tokenizer) -> Split:
    found = {source: [Shard(folder / stem) for stem in about["shards"]] for source, about in sources.items()}
    for shard in (shard for shards in found.values() for shard in shards):
        if shard.header is None or shard.header.tokenizer != tokenizer.fingerprint:
            raise DataError(f"{shard.stem}.bin has another tokenizer than {folder}; prepare the corpus again")
    return found


def _packs(config: DataConfig, files: Split, sources: tuple[str, ...], vocab_size: int, train: bool) -> PackedDataset:
    is_mixed = train and bool(config.mix)
    names = [name for name in sorted(files) if not is_mixed or config.mix.get(name, 0) > 0]
    # random tokens have no folder for a packing plan
    kind = Concat if config.source is Source.random else find_packing(config.packing)
    seed = config.seed if train else None
    packings = {sources.index(name): kind([*files[name]], config.pack_tokens, seed=seed) for name in names}
    weights = [config.mix[name] for name in names] if is_mixed else []
    empty = [sources[number] for number, packing in packings.items() if not packing.n_packs]
    if train and (len(empty) == len(names) or (is_mixed and empty)):
        size = f"{config.pack_tokens} tokens; lower data.seq_len or add text"
        raise DataError(f"source {', '.join(empty)} does not fill one pack of {size}")
    return PackedDataset(packings, config, vocab_size, weights)
