"""Packs against InternLM's published content."""

from pathlib import Path

import numpy as np
import pytest

from data.config import Packing
from data.corpus import PackSet
from data.packing import Pack, PackedStream, RandomStream
from data.shards import Shard, ShardWriter

LENGTHS = (5, 3, 9, 2, 7)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Documents whose k-th has tokens 10 (k + 1) + j."""
    writer = ShardWriter(tmp_path / "en", vocab_size=100, tokenizer="t")
    for k, length in enumerate(LENGTHS):
        writer.add(np.arange(length, dtype=np.uint32) + 10 * (k + 1), length)
    writer.close()
    return Shard(tmp_path / "en", verify=True)


def stream(shard: Shard, packing: Packing, pack_len: int = 8, seq_len: int = 4) -> PackedStream:
    order = np.array([2, 0, 4, 1, 3])
    return PackedStream(shard, pack_len=pack_len, seq_len=seq_len, packing=packing, order=order, source=0)


def written(pack: Pack) -> tuple[str, str, str, str]:
    cu = np.cumsum([0, *pack.segment_lens])
    return tuple(" ".join(map(str, part)) for part in (pack.tokens_T, cu, pack.positions_T, pack.labels_T))  # type: ignore[return-value]


def test_isolated_packs_have_internlms_content(shard: Shard) -> None:
    packs = stream(shard, Packing.internlm)
    assert packs.n_packs(padded=False) == 3
    assert [written(packs.pack(i)) for i in range(3)] == [
        ("30 31 32 33 34 35 36 37", "0 4 8", "0 1 2 3 0 1 2 3", "31 32 33 34 35 36 37 38"),
        ("38 10 11 12 13 14 50 51", "0 1 5 6 8", "0 0 1 2 3 0 0 1", "-100 11 12 13 14 -100 51 52"),
        ("52 53 54 55 56 20 21 22", "0 4 5 8", "0 1 2 3 0 0 1 2", "53 54 55 56 -100 21 22 -100"),
    ]


def test_packs_in_one_have_internlms_content(shard: Shard) -> None:
    packs = stream(shard, Packing.internlm_one)
    assert [written(packs.pack(i)) for i in range(3)] == [
        ("30 31 32 33 34 35 36 37", "0 4 8", "0 1 2 3 0 1 2 3", "31 32 33 34 35 36 37 -100"),
        ("38 10 11 12 13 14 50 51", "0 4 8", "0 1 2 3 0 1 2 3", "-100 11 12 13 14 -100 51 -100"),
        ("52 53 54 55 56 20 21 22", "0 4 8", "0 1 2 3 0 1 2 3", "53 54 55 56 -100 21 22 -100"),
    ]


@pytest.mark.parametrize("pack_len", [4, 8, 16, 32])
def test_padded_packs_hold_every_token_and_every_target_once(shard: Shard, pack_len: int) -> None:
    packs = stream(shard, Packing.internlm, pack_len=pack_len)
    found = [packs.pack(i) for i in range(packs.n_packs(padded=True))]
    documents = [shard.document(i).tolist() for i in (2, 0, 4, 1, 3)]
    tokens = np.concatenate([pack.tokens_T for pack in found])
    assert tokens[: sum(LENGTHS)].tolist() == sum(documents, [])
    targets = [label for pack in found for label in pack.labels_T.tolist() if label != -100]
    assert targets == sum((document[1:] for document in documents), [])
    for pack in found:
        assert sum(pack.segment_lens) == pack_len and max(pack.segment_lens) <= 4


def test_the_order_of_packs_is_internlms_and_continues_through_epochs() -> None:
    packs = PackSet([RandomStream(vocab_size=9, pack_len=4, seq_len=4, seed=0, n_packs=10)], seed=1024, padded=False)
    order: list[int] = []
    packs.in_order = lambda index: order.append(index)  # type: ignore[assignment, return-value]
    for index in range(20):
        packs.sample(index)
    assert order[:10] == [2, 3, 7, 0, 6, 8, 5, 4, 9, 1]
    random = np.random.RandomState(1024)
    epochs = [np.arange(10), np.arange(10)]
    for epoch in epochs:
        random.shuffle(epoch)
    assert order == [*epochs[0], *epochs[1]]
    order.clear()
    packs.sample(3)
    assert order == [0], "an earlier epoch can be asked for again"


def test_packs_of_several_sources_are_found_by_their_place(shard: Shard) -> None:
    first, second = stream(shard, Packing.internlm), stream(shard, Packing.internlm, pack_len=4)
    second.source = 1
    both = PackSet([first, second], seed=0, padded=False)
    assert both.n_packs == 3 + 6
    assert [both.in_order(i).source for i in range(9)] == [0] * 3 + [1] * 6
    assert both.in_order(4).tokens_T.tolist() == [34, 35, 36, 37]


def test_random_packs_are_a_function_of_their_index() -> None:
    one, other = (RandomStream(vocab_size=50, pack_len=8, seq_len=4, seed=3, n_packs=9) for _ in range(2))
    assert one.pack(5).tokens_T.tolist() == other.pack(5).tokens_T.tolist() != one.pack(6).tokens_T.tolist()
    pack = one.pack(0)
    assert pack.labels_T.tolist() == [*pack.tokens_T[1:4], -100, *pack.tokens_T[5:], -100]
