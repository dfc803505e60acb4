"""Speed of reading batches: python -m benchmarks.loader

Writes a temporary corpus with document lengths like The Pile's (log-normal, median 300 tokens) and reads it in random
order, in one process, from a warm page cache. Then opens 2 TB of tokens in sparse files.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from corpus.config import Source
from data.config import DataConfig
from data.dataset import PackedDataset
from data.loader import keep_freed_memory
from data.packing import PACKINGS, Concat, Packing, waste
from data.shards import FORMAT_VERSION, INDEX_HEADER, MAGIC, Header, Shard, ShardWriter

VOCAB_SIZE = 103168
SEQ_LEN = 2048
BATCH = 64


def lengths(random: np.random.Generator, n_documents: int) -> np.ndarray:
    return np.clip(random.lognormal(5.7, 1.35, n_documents), 4, 200_000).astype(np.int64)


def write(folder: Path, n_tokens: int) -> list[Shard]:
    """Write shards of random tokens."""
    random = np.random.default_rng(0)
    shards = []
    for number in range(4):
        writer = ShardWriter(folder / f"en-{number:05d}", vocab_size=VOCAB_SIZE, tokenizer="t")
        sizes = lengths(random, n_tokens // 4 // 750)
        writer.add(random.integers(0, VOCAB_SIZE, int(sizes.sum()), dtype=np.uint32), sizes, 0)
        writer.close()
        shards.append(Shard(writer.stem))
    return shards


def packs(packing: Packing, name: str) -> PackedDataset:
    config = DataConfig(
        name="b", path="b", source=Source.local, packing=name, seq_len=SEQ_LEN, micro_batch_size=BATCH
    )  # fmt: skip
    return PackedDataset({0: packing}, config, vocab_size=VOCAB_SIZE)


def read_speed(packing: Packing, name: str, seconds: float) -> float:
    """Return the samples per second that one process batches."""
    found = packs(packing, name)
    samples = np.arange(BATCH)
    found.batch(found.locate(samples))
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        samples += BATCH
        found.batch(found.locate(samples))
        done += BATCH
    return done / (time.perf_counter() - start)


def copy_speed(shards: list[Shard], seconds: float) -> float:
    """Return the samples per second of the bare reads: memory map, slice, copy to int64."""
    maps = [np.memmap(f"{shard.stem}.bin", dtype=shard.dtype, mode="r") for shard in shards]
    random = np.random.default_rng(0)
    places = [(int(f), int(random.integers(0, len(maps[f]) - SEQ_LEN))) for f in random.integers(0, len(maps), 4096)]
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for file, place in places:
            maps[file][place : place + SEQ_LEN].astype(np.int64)
        done += len(places)
    return done / (time.perf_counter() - start)


def write_sparse(folder: Path, n_files: int, n_bytes: int) -> list[Path]:
    """Write sparse shards: with their full size and index, without tokens."""
    sizes = lengths(np.random.default_rng(1), n_bytes // 4 // 750)
    sizes[-1] += n_bytes // 4 - sizes.sum()
    starts = (np.cumsum(sizes) - sizes) * 4
    index = b"".join(
        (
            INDEX_HEADER.pack(MAGIC, 1, 4, len(sizes), len(sizes) + 1),
            sizes.astype("<i4").tobytes(),
            starts.astype("<i8").tobytes(),
            np.arange(len(sizes) + 1, dtype="<i8").tobytes(),
        )
    )
    (folder / "index").write_bytes(index)
    stems = []
    for number in range(n_files):
        stem = folder / f"en-{number:05d}"
        with open(f"{stem}.bin", "wb") as file:
            file.truncate(n_bytes)
        os.link(folder / "index", f"{stem}.idx")
        header = Header(
            FORMAT_VERSION, "uint32", VOCAB_SIZE, "t", False, len(sizes), n_bytes // 4, 0, 0, str(number), str(number)
        )
        Path(f"{stem}.json").write_text(json.dumps(asdict(header)), encoding="utf-8")
        stems.append(stem)
    return stems


def resident_mb() -> float:
    """Return the resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--terabytes", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    keep_freed_memory()  # as loader workers do
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write(folder, arguments.tokens)
        bare = copy_speed(shards, arguments.seconds)
        print(f"{'':24} {'samples/s':>10} {'of a bare copy':>15} {'padding':>9} {'truncated':>14}")
        print(f"{'memory map and copy':24} {bare:10,.0f} {1:15.2f}")
        for packing_name, kind in PACKINGS.items():
            packing = kind([*shards], SEQ_LEN, seed=0)
            speed = read_speed(packing, packing_name, arguments.seconds)
            padding, truncated = waste(packing.n_packs, packing.pieces, packing.pack_len)
            print(f"{packing_name:24} {speed:10,.0f} {speed / bare:15.2f} {padding:9.2%} {truncated:14.2%}")
    with tempfile.TemporaryDirectory() as name:
        n_files = int(arguments.terabytes * 1e12) >> 30
        stems = write_sparse(Path(name), n_files, 1 << 30)
        before, start = resident_mb(), time.perf_counter()
        found = packs(Concat([Shard(stem) for stem in stems], SEQ_LEN, seed=0), "concat")
        opened = time.perf_counter() - start
        for step in range(200):
            found.batch(found.locate(np.arange(step * BATCH, (step + 1) * BATCH)))
        print(
            f"\n{n_files} files, {n_files / 931:.2f} TB, opened in {opened:.2f} s; {200 * BATCH:,} samples from "
            f"all of them took {resident_mb() - before:.0f} MiB of memory"
        )


if __name__ == "__main__":
    main()
