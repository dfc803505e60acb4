"""Packs against InternLM's published content, and against what every packing must keep."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.config import DataError
from data.batches import IGNORED, Batch, collate
from data.best_fit import HEADER, best_fit
from data.config import Packing
from data.packing import BestFit, Layout, RandomTokens, Shuffled, layout_of
from data.shards import Shard, ShardWriter

LENGTHS = (5, 3, 9, 2, 7)


def write(stem: Path, lengths: list[int] | tuple[int, ...], *, masked: bool = False) -> Shard:
    """Write documents whose k-th has tokens 10 (k + 1) + j."""
    writer = ShardWriter(stem, vocab_size=100_000, tokenizer="t", masked=masked)
    for k, length in enumerate(lengths):
        writer.add(np.arange(length, dtype=np.uint32) + 10 * (k + 1), length)
    writer.close()
    return Shard(stem, verify=True)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return write(tmp_path / "en", LENGTHS)


def ordered(shard: Shard, pack_len: int = 8, *, padded: bool = False) -> Shuffled:
    layout = Shuffled([shard], pack_len, seed=None, padded=padded)
    layout.order = np.array([2, 0, 4, 1, 3])
    layout.limits = np.concatenate([[0], np.cumsum(layout.length[layout.order])])
    return layout


def batch(layout: Layout, packs: list[int], *, seq_len: int, isolated: bool = True) -> Batch:
    return collate(layout.rows(np.array(packs)), np.zeros(len(packs), np.int64), seq_len=seq_len, isolated=isolated)


def written(one: Batch) -> tuple[str, ...]:
    parts = (one.tokens_BT[0], one.cu_seqlens, one.positions_BT[0], one.labels_BT[0])
    return tuple(" ".join(map(str, part.tolist())) for part in parts)


def test_isolated_packs_have_internlms_content(shard: Shard) -> None:
    layout = ordered(shard)
    assert layout.n_packs == 3
    assert [written(batch(layout, [i], seq_len=4)) for i in range(3)] == [
        ("30 31 32 33 34 35 36 37", "0 4 8", "0 1 2 3 0 1 2 3", "31 32 33 34 35 36 37 38"),
        ("38 10 11 12 13 14 50 51", "0 1 5 6 8", "0 0 1 2 3 0 0 1", "-100 11 12 13 14 -100 51 52"),
        ("52 53 54 55 56 20 21 22", "0 4 5 8", "0 1 2 3 0 0 1 2", "53 54 55 56 -100 21 22 -100"),
    ]


def test_packs_in_one_have_internlms_content(shard: Shard) -> None:
    layout = ordered(shard)
    assert [written(batch(layout, [i], seq_len=4, isolated=False)) for i in range(3)] == [
        ("30 31 32 33 34 35 36 37", "0 4 8", "0 1 2 3 0 1 2 3", "31 32 33 34 35 36 37 -100"),
        ("38 10 11 12 13 14 50 51", "0 4 8", "0 1 2 3 0 1 2 3", "-100 11 12 13 14 -100 51 -100"),
        ("52 53 54 55 56 20 21 22", "0 4 8", "0 1 2 3 0 1 2 3", "53 54 55 56 -100 21 22 -100"),
    ]


def test_internlms_documents_are_shuffled_as_numpy_shuffles_them(tmp_path: Path) -> None:
    layout = Shuffled([write(tmp_path / "en", [3] * 10)], 4, seed=1024, padded=False)
    assert layout.order.tolist() == [2, 3, 7, 0, 6, 8, 5, 4, 9, 1]


def test_a_batch_of_rows_is_the_rows_side_by_side(shard: Shard) -> None:
    for packing in Packing:
        layout = layout_of([shard], packing, 8, seed=1, train=False)
        packs = list(range(layout.n_packs))
        whole = batch(layout, packs, seq_len=4)
        ones = [batch(layout, [pack], seq_len=4) for pack in packs]
        for name in ("tokens_BT", "labels_BT", "positions_BT"):
            assert getattr(whole, name).tolist() == [getattr(one, name)[0].tolist() for one in ones], packing
        limits = [limit + 8 * i for i, one in enumerate(ones) for limit in one.cu_seqlens.tolist()]
        assert sorted(set(limits)) == whole.cu_seqlens.tolist()


LENGTHS_OF_FILES = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=3)


@given(lengths=LENGTHS_OF_FILES, pack_len=st.sampled_from([4, 8, 16]), packing=st.sampled_from(list(Packing)))
@settings(max_examples=150, deadline=None)
def test_every_token_is_in_one_pack_and_every_target_is_the_next_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], pack_len: int, packing: Packing
) -> None:
    folder = tmp_path_factory.mktemp("p")
    documents, files = [], []
    for number, its in enumerate(lengths):
        writer = ShardWriter(folder / str(number), vocab_size=100_000, tokenizer="t")
        for length in its:
            documents.append([len(documents) * 100 + j + 1 for j in range(length)])
            writer.add(np.array(documents[-1], dtype=np.uint32), length)
        writer.close()
        files.append(Shard(folder / str(number)))
    layout = layout_of(list(files), packing, pack_len, seed=3, train=False)
    tokens, targets = Counter(), Counter()
    for start in range(0, layout.n_packs, 3):
        packs = list(range(start, min(start + 3, layout.n_packs)))
        one = batch(layout, packs, seq_len=4)
        for row, pack in enumerate(packs):
            used = sum(piece.length for piece in layout.pieces(pack))
            held = one.tokens_BT[row].tolist()
            assert held[used:] == [0] * (pack_len - used)
            assert held[:used] == [t for p in layout.pieces(pack) for t in p.file.read(p.start, p.length).tolist()]
            tokens.update(held[:used])
            for token, label in zip(held, one.labels_BT[row].tolist(), strict=True):
                if label != IGNORED:
                    assert label == token + 1, "a target is the next token of the same document"
                    targets[label] += 1
        assert max(np.diff(one.cu_seqlens)) <= 4 and one.max_seq_len == max(np.diff(one.cu_seqlens))
    assert tokens == Counter(token for document in documents for token in document)
    assert targets == Counter(token for document in documents for token in document[1:])
    padding, cut = layout.waste()
    total = layout.n_packs * pack_len
    assert 0 <= cut <= 1 and (not total or padding == pytest.approx(1 - sum(tokens.values()) / total))


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(4, 24))
@settings(max_examples=200, deadline=None)
def test_best_fit_cuts_no_document_that_fits_and_wastes_no_more_than_first_fit(
    lengths: list[int], pack_len: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pieces, firsts = best_fit(offsets, pack_len)
    sizes = [int(pieces[a:b, 1].sum()) for a, b in pairwise(firsts)]
    assert all(0 < size <= pack_len for size in sizes)
    whole = {(int(start), int(length)) for start, length, _ in pieces}
    for start, length in zip(offsets[:-1].tolist(), lengths, strict=True):
        assert not 0 < length <= pack_len or (start, length) in whole
    rests = sorted((length % pack_len for length in lengths if length % pack_len), reverse=True)
    bins: list[int] = []
    for length in rests:  # first-fit-decreasing: within 11/9 of the least, and best-fit-decreasing is too
        fitting = next((i for i, room in enumerate(bins) if room >= length), None)
        if fitting is None:
            bins.append(pack_len - length)
        else:
            bins[fitting] -= length
    assert len(sizes) - sum(length // pack_len for length in lengths) <= 11 / 9 * len(bins) + 1


def test_best_fits_plan_is_kept_beside_the_tokens(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BestFit([shard], 8)
    assert first.n_packs == 4, "9 is cut into 8 and 1; 7 with 1, 5 with 3, 2"
    assert BestFit([shard], 16).n_packs == 2
    assert {path.name for path in shard.stem.parent.glob("*fit*")} == {"en.fit-8", "en.fit-16"}
    with monkeypatch.context() as patch:
        patch.setattr("data.best_fit.best_fit", lambda *arguments: pytest.fail("it is made again"))
        again = BestFit([shard], 8)
    assert [first.pieces(i) for i in range(4)] == [again.pieces(i) for i in range(4)] and first.waste() == again.waste()
    monkeypatch.setattr("os.access", lambda *arguments: False)
    (shard.stem.parent / "en.fit-8").unlink()
    unkept = BestFit([shard], 8)
    assert [first.pieces(i) for i in range(4)] == [unkept.pieces(i) for i in range(4)]
    assert not (shard.stem.parent / "en.fit-8").exists()


@pytest.mark.parametrize("size", [0, 7, HEADER.size, -1])
def test_a_plan_of_other_tokens_and_a_damaged_one_are_made_again(tmp_path: Path, size: int) -> None:
    before = BestFit([write(tmp_path / "en", LENGTHS)], 8)
    path = tmp_path / "en.fit-8"
    (tmp_path / "other").mkdir()
    expected = BestFit([write(tmp_path / "other" / "en", LENGTHS[:3])], 8)
    now = BestFit([write(tmp_path / "en", LENGTHS[:3])], 8)
    assert now.n_packs == expected.n_packs != before.n_packs
    plan = [piece[1:] for pack in range(now.n_packs) for piece in now.pieces(pack)]
    assert plan == [piece[1:] for pack in range(now.n_packs) for piece in expected.pieces(pack)]
    path.write_bytes(path.read_bytes()[:size])
    again = BestFit(now.files, 8)
    assert [piece[1:] for pack in range(again.n_packs) for piece in again.pieces(pack)] == plan
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(DataError, match=r"en.fit-8 was cut short while it was in use"):
        again.pieces(again.n_packs - 1)


def test_a_document_that_is_cut_twice_is_one_document_that_is_cut(tmp_path: Path) -> None:
    assert BestFit([write(tmp_path / "en", (20, 4, 4, 8))], 8).waste() == (pytest.approx(0.1), 0.25)


def test_best_fit_cuts_fewer_documents_than_concatenation(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 2000).tolist()
    shard = write(tmp_path / "en", lengths)
    shares = {packing: layout_of([shard], packing, 64, seed=0, train=True).waste() for packing in Packing}
    assert shares[Packing.best_fit][1] == 0 and shares[Packing.best_fit][0] < 0.02
    assert shares[Packing.concat][1] > 0.3 and shares[Packing.concat][0] < 0.01


def test_tokens_that_are_not_to_be_learnt_are_no_targets(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "sft", vocab_size=100, tokenizer="t", masked=True)
    ids = np.array([1, 2, 0, 4, 5, 6], dtype=np.uint32)
    writer.add(np.where([1, 1, 0, 0, 1, 0], ids | np.uint32(1 << 31), ids), 6)
    writer.close()
    for packing in Packing:
        one = batch(layout_of([Shard(tmp_path / "sft")], packing, 8, seed=0, train=False), [0], seq_len=8)
        assert one.tokens_BT[0].tolist() == [1, 2, 0, 4, 5, 6, 0, 0]
        assert one.labels_BT[0].tolist() == [-100, 0, 4, -100, 6, -100, -100, -100], (
            "and token 0 is a token like any other"
        )


def test_random_packs_are_a_function_of_their_number() -> None:
    one, other = (RandomTokens(vocab_size=50, pack_len=8, seq_len=4, seed=3, n_packs=9) for _ in range(2))
    first, second = batch(one, [5], seq_len=4), batch(other, [6, 5], seq_len=4)
    assert first.tokens_BT[0].tolist() == second.tokens_BT[1].tolist() != second.tokens_BT[0].tolist()
    tokens = first.tokens_BT[0].tolist()
    assert first.labels_BT[0].tolist() == [*tokens[1:4], IGNORED, *tokens[5:], IGNORED]
