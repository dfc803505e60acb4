"""Packs against InternLM's published content, against what every packing must keep, and one of the user's own."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import IGNORED, Batch, collate
from data.best_fit import best_fit
from data.dataset import open_corpus
from data.packing import PACKINGS, BestFit, InternLM, InternLMOne, Packing, Pieces, RandomTokens, read_rows, waste
from data.shards import LOSS_MASKED, Shard
from tests.conftest import trained
from tests.data.conftest import data_config, write_shard

LENGTHS = (5, 3, 9, 2, 7)


def write(stem: Path, lengths: list[int] | tuple[int, ...]) -> Shard:
    """Write documents whose k-th has tokens 10 (k + 1) + j."""
    return write_shard(stem, [np.arange(length) + 10 * (k + 1) for k, length in enumerate(lengths)])


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return write(tmp_path / "en", LENGTHS)


def batch(packing: Packing, packs: list[int], *, seq_len: int) -> Batch:
    rows = read_rows(packing.files, packing.pieces(np.array(packs)), packing.pack_len, seq_len)
    return collate(rows, np.zeros(len(packs), np.int64), seq_len=seq_len, isolated=packing.isolated)


def columns(packing: Packing) -> list[list[int]]:
    return [column.tolist() for column in packing.pieces(np.arange(packing.n_packs))]


def waste_of(packing: Packing) -> tuple[float, float]:
    return waste(packing.n_packs, packing.pieces, packing.pack_len)


ISOLATED = [
    ("30 31 32 33 34 35 36 37", "0 4 8", "0 1 2 3 0 1 2 3", "31 32 33 34 35 36 37 38"),
    ("38 10 11 12 13 14 50 51", "0 1 5 6 8", "0 0 1 2 3 0 0 1", "-100 11 12 13 14 -100 51 52"),
    ("52 53 54 55 56 20 21 22", "0 4 5 8", "0 1 2 3 0 0 1 2", "53 54 55 56 -100 21 22 -100"),
]
IN_ONE = [
    ("30 31 32 33 34 35 36 37", "0 4 8", "0 1 2 3 0 1 2 3", "31 32 33 34 35 36 37 -100"),
    ("38 10 11 12 13 14 50 51", "0 4 8", "0 1 2 3 0 1 2 3", "-100 11 12 13 14 -100 51 -100"),
    ("52 53 54 55 56 20 21 22", "0 4 8", "0 1 2 3 0 1 2 3", "53 54 55 56 -100 21 22 -100"),
]


@pytest.mark.parametrize(("kind", "expected"), [(InternLM, ISOLATED), (InternLMOne, IN_ONE)])
def test_packs_of_internlm(shard: Shard, kind: type[InternLM], expected: list[tuple[str, str, str, str]]) -> None:
    packing = kind([shard], 8, seed=0)
    packing.set_order(np.array([2, 0, 4, 1, 3]))
    assert packing.n_packs == 3
    shuffled = InternLM([write(shard.stem.with_name("ten"), [3] * 10)], 4, seed=1024)
    assert shuffled.order.tolist() == [2, 3, 7, 0, 6, 8, 5, 4, 9, 1], "as numpy shuffles"
    for pack in range(3):
        one = batch(packing, [pack], seq_len=4)
        parts = (one.tokens_BT[0], one.cu_seqlens, one.positions_BT[0], one.labels_BT[0])
        assert tuple(" ".join(map(str, part.tolist())) for part in parts) == expected[pack]


OF_FILES = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=3)


@given(lengths=OF_FILES, pack_len=st.sampled_from([4, 8, 16]), name=st.sampled_from(list(PACKINGS)))
@settings(max_examples=50, deadline=None)
def test_tokens_are_in_one_pack_and_targets_follow(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], pack_len: int, name: str
) -> None:
    folder = tmp_path_factory.mktemp("p")
    counted = iter(range(1, 100))
    documents = [[np.arange(1, length + 1) + 100 * next(counted) for length in its] for its in lengths]
    files = [write_shard(folder / str(number), its) for number, its in enumerate(documents)]
    packing = PACKINGS[name]([*files], pack_len, seed=None)
    tokens, targets = Counter(), Counter()
    for start in range(0, packing.n_packs, 3):
        packs = np.arange(start, min(start + 3, packing.n_packs))
        one, pieces = batch(packing, packs.tolist(), seq_len=4), packing.pieces(packs)
        assert pieces.n_pieces.sum() == len(pieces.starts) and (pieces.lengths > 0).all()
        for row, its in enumerate(np.split(np.arange(len(pieces.starts)), np.cumsum(pieces.n_pieces)[:-1])):
            parts = [(files[pieces.files[i]], int(pieces.starts[i]), int(pieces.lengths[i])) for i in its]
            used = sum(length for *_, length in parts)
            held = one.tokens_BT[row].tolist()
            assert held[used:] == [0] * (pack_len - used)
            assert held[:used] == [t for file, at, length in parts for t in file.read(at, length).tolist()]
            tokens.update(held[:used])
            for token, label in zip(held, one.labels_BT[row].tolist(), strict=True):
                if label != IGNORED:
                    assert label == token + 1, "a target is the next token of the same document"
                    targets[label] += 1
        for i, (file, start_token, length) in enumerate(zip(pieces.files, pieces.starts, pieces.lengths, strict=True)):
            offsets = files[file].offsets()
            assert pieces.begins[i] == (start_token in offsets) and pieces.ends[i] == (start_token + length in offsets)
        assert one.max_seq_len == max(np.diff(one.cu_seqlens)) <= 4
    every = [document for its in documents for document in its]
    assert tokens == Counter(token for document in every for token in document)
    inside = Counter(token for document in every for token in document[1:])
    assert targets == inside if packing.isolated else targets <= inside
    padding, cut = waste_of(packing)
    total = packing.n_packs * pack_len
    assert not total or padding == pytest.approx(1 - sum(tokens.values()) / total)
    if total:
        _, _, _, _, begins, ends = packing.pieces(np.arange(packing.n_packs))
        assert cut == 1 - (begins & ends).sum() / begins.sum()


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(4, 24))
@settings(max_examples=60, deadline=None)
def test_best_fit_keeps_documents_whole(lengths: list[int], pack_len: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pieces, firsts = best_fit(offsets, pack_len)
    sizes = [int(pieces[a:b, 1].sum()) for a, b in pairwise(firsts)]
    assert all(0 < size <= pack_len for size in sizes)
    whole = {(int(start), int(length)) for start, length, begins, ends in pieces if begins and ends}
    fitting = {(s, n) for s, n in zip(offsets[:-1].tolist(), lengths, strict=True) if 0 < n <= pack_len}
    assert whole == fitting
    bins: list[int] = []
    # first-fit-decreasing is within 11/9 of the least, and best-fit-decreasing is too
    for length in sorted((length % pack_len for length in lengths if length % pack_len), reverse=True):
        fits = next((i for i, room in enumerate(bins) if room >= length), None)
        if fits is None:
            bins.append(pack_len - length)
        else:
            bins[fits] -= length
    assert len(sizes) - sum(length // pack_len for length in lengths) <= 11 / 9 * len(bins) + 1


def test_plan_is_kept_beside_the_tokens(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BestFit([shard], 8, seed=0)
    assert first.n_packs == 4, "9 is cut into 8 and 1; 7 with 1, 5 with 3, 2"
    assert BestFit([shard], 16, seed=0).n_packs == 2
    assert {path.name for path in shard.stem.parent.glob("*fit*")} == {"en.fit-8", "en.fit-16"}
    with monkeypatch.context() as patch:
        patch.setattr("data.best_fit.best_fit", lambda *arguments: pytest.fail("it is made again"))
        assert columns(BestFit([shard], 8, seed=0)) == columns(first)
    monkeypatch.setattr("os.access", lambda *arguments: False)
    (shard.stem.parent / "en.fit-8").unlink()
    assert columns(BestFit([shard], 8, seed=0)) == columns(first)
    assert not (shard.stem.parent / "en.fit-8").exists()


@pytest.mark.parametrize("size", [0, -8])
def test_stale_and_damaged_plans_are_made_again(tmp_path: Path, size: int) -> None:
    BestFit([write(tmp_path / "en", LENGTHS)], 8, seed=0)
    path = tmp_path / "en.fit-8"
    expected = columns(BestFit([write(tmp_path / "other", LENGTHS[:3])], 8, seed=0))
    now = BestFit([write(tmp_path / "en", LENGTHS[:3])], 8, seed=0)
    assert columns(now) == expected
    path.write_bytes(path.read_bytes()[:size])
    assert columns(BestFit(now.files, 8, seed=0)) == expected


@pytest.mark.parametrize("name", PACKINGS)
def test_masked_tokens_are_no_targets(tmp_path: Path, name: str) -> None:
    ids = np.array([1, 2, 0, 4, 5, 6], dtype=np.uint32)
    ids = np.where([1, 1, 0, 0, 1, 0], ids | np.uint32(LOSS_MASKED), ids)
    packing = PACKINGS[name]([write_shard(tmp_path / "sft", [ids], vocab_size=100, masked=True)], 8, seed=None)
    one = batch(packing, [0], seq_len=8)
    assert one.tokens_BT[0].tolist() == [1, 2, 0, 4, 5, 6, 0, 0]
    assert one.labels_BT[0].tolist() == [-100, 0, 4, -100, 6, -100, -100, -100], "token 0 is a token like any other"


@pytest.mark.parametrize("name", [name for name in PACKINGS if PACKINGS[name].isolated])
@pytest.mark.parametrize(("pack_len", "seq_len"), [(8, 4), (4, 4)])
def test_targets_of_a_conversation_see_its_start(tmp_path: Path, name: str, pack_len: int, seq_len: int) -> None:
    documents = [np.arange(length) + 10 * (k + 1) for k, length in enumerate(LENGTHS)]
    text = write_shard(tmp_path / "text", [np.arange(9) + 100] * 3)
    packing = PACKINGS[name]([write_shard(tmp_path / "sft", documents, masked=True), text], pack_len, seed=None)
    learnt = []
    for pack in range(packing.n_packs):
        one = batch(packing, [pack], seq_len=seq_len)
        for a, b in pairwise(one.cu_seqlens.tolist()):
            targets = [target for target in one.labels_BT[0, a:b].tolist() if target != IGNORED]
            assert not targets or targets[0] > 100 or one.tokens_BT[0, a] % 10 == 0
            learnt += targets
    assert sum(target > 100 for target in learnt) == 24, "text goes on without its beginning"
    if name == "best_fit":
        whole = [10 * (k + 1) + j for k, n in enumerate(LENGTHS) for j in range(1, min(n, seq_len + 1))]
        assert sorted(target for target in learnt if target < 100) == whole
        assert packing.n_packs == {8: 8, 4: 12}[pack_len], "what is cut off is in no pack"


def test_random_tokens_are_a_function_of_their_place() -> None:
    one, other, third = (RandomTokens(50, 10_000, 4, seed) for seed in (3, 3, 4))
    tokens = one.read(0, 10_000)
    assert tokens[40:72].tolist() == other.read(40, 32).tolist() != third.read(40, 32).tolist()
    counts = np.bincount(tokens, minlength=50)
    assert counts.min() > 120 and counts.max() < 280, "200 of each"


class Truncated(Packing):
    """The first tokens of every document, one document per pack."""

    def lay_out(self) -> None:
        offsets = [file.offsets() for file in self.files]
        self.file = np.repeat(np.arange(len(offsets)), [len(o) - 1 for o in offsets])
        self.start, self.stop = (np.concatenate([o[part] for o in offsets]) for part in (slice(-1), slice(1, None)))
        self.n_packs = len(self.file)

    def pieces(self, packs: np.ndarray) -> Pieces:
        lengths = self.stop[packs] - self.start[packs]
        kept, yes = np.minimum(lengths, self.pack_len), np.ones(len(packs), dtype=bool)
        return Pieces(np.ones_like(packs), self.file[packs], self.start[packs], kept, yes, kept == lengths)


def test_packing_of_the_users_own(corpus_dir: Path, small: list[str], tmp_path: Path) -> None:
    name = f"{__name__}:Truncated"
    corpus = open_corpus(data_config(corpus_dir, packing=name), vocab_size=1024)
    file, found = corpus.train.files[0], corpus.train.batch(np.arange(3))
    assert found.tokens_BT.shape == (3, 8)
    assert found.tokens_BT.tolist() == [(file.document(k).tolist() + [0] * 8)[:8] for k in range(3)]
    trained(tmp_path / "run", *small, f"data.packing={name}", "steps=3")
    assert (tmp_path / "run" / "checkpoints").exists()
