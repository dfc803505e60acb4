"""Log-likelihoods and continuations: equal to transformers', and the same in every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from tests.parallel.layouts import MODELS, Case, run
from training.config import Dtype
from training.load import Saved, open_saved
from training.scoring import Encoded, Shape, encode, extend, fill, pack, score, windows
from training.setup import build_evaluator

PAIRS = [
    ("def main(", "argv):"), ("def main( ", "argv):"), ("import", " os"), ("", "The quick brown fox"),
    ("x = 1\n" * 30, "y = 2"), ("", "y = 2\n" * 40), ("今天", "天气"),
]  # fmt: skip
SHAPE = Shape(rows=2, row_len=64, context=64)


def evaluator(saved: Saved, mesh: Mesh | None = None, config: ParallelConfig | None = None) -> Engine:
    return build_evaluator(saved, mesh or Mesh(torch.device("cpu")), config or ParallelConfig(), Dtype.fp32)


def reference(hf_dir: Path, texts: list[Encoded], context: int) -> list[tuple[list[float], bool]]:
    """Return what transformers makes of each text's tokens, in windows as lm-evaluation-harness cuts them."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32), []
    for text in texts:
        nll, greedy, start = list[float](), True, text.n_given
        while start < len(text.ids):
            end = min(start + context, len(text.ids))
            ids = torch.tensor(text.ids[max(0, end - 1 - context) : end]).long()
            with torch.no_grad():
                log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)[start - end :]
            targets = ids[start - end :]
            nll += (-log_probs.gather(1, targets[:, None])[:, 0]).tolist()
            greedy = greedy and bool((log_probs.argmax(-1) == targets).all())
            start = end
        found.append((nll, greedy))
    return found


def test_log_likelihoods_of_tokens_are_those_of_transformers(run_dir: Path, hf_dir: Path) -> None:
    saved = open_saved(run_dir)
    assert saved.tokenizer is not None
    texts = encode(saved.tokenizer, PAIRS, add_bos=saved.add_bos)
    parts = [part for text in texts for part in windows(text, SHAPE.context)]
    rows = pack([len(part.ids) for part in parts], SHAPE.row_len + 1)
    batch = fill(parts, [0] * len(parts), rows, SHAPE.row_len)
    n_places = batch.tokens_BT.numel()
    batch.source_BT = torch.arange(n_places).view_as(batch.tokens_BT)  # each token is summed by itself
    nll, _, n_targets, _ = evaluator(saved).evaluate([batch], n_sources=n_places).T
    assert n_targets.max() == 1 and max(map(len, rows)) > 1
    expected = reference(hf_dir, [parts[number] for row in rows for number in row], SHAPE.context)
    np.testing.assert_allclose(nll[n_targets == 1], [each for its, _ in expected for each in its], atol=1e-4)


def test_log_likelihoods_are_those_of_transformers(run_dir: Path, hf_dir: Path) -> None:
    saved = open_saved(run_dir)
    assert saved.tokenizer is not None
    texts = encode(saved.tokenizer, PAIRS, add_bos=saved.add_bos)
    engine = evaluator(saved)
    (likely,) = extend(engine, [texts[0].ids.tolist()], SHAPE, max_new_tokens=3, choose=greedy)
    texts.append(Encoded(np.array([*texts[0].ids, *likely], dtype=np.int32), len(texts[0].ids)))
    assert max(len(text.ids) for text in texts) > 2 * SHAPE.context, "some need several windows"
    nll, is_greedy = score(engine, texts, SHAPE)
    expected = reference(hf_dir, texts, SHAPE.context)
    np.testing.assert_allclose(nll, [sum(its) for its, _ in expected], atol=1e-4)
    assert is_greedy == [its for _, its in expected] and is_greedy[-1] and not all(is_greedy)
    other = score(engine, texts[::-1], Shape(rows=1, row_len=128, context=64))[0][::-1]
    np.testing.assert_allclose(nll, other, atol=1e-4, err_msg="scores depend on how texts are batched")


def greedy(_number: int, _new: list[int], logits_V: Tensor) -> int:
    return int(logits_V.argmax())


CASES = {
    "ddp_2": Case(2, layout={"dp_replicate": 2}),
    "zero1_2": Case(2, layout={"dp_shard": 2, "zero_stage": 1}),
    "tp_2": Case(2, layout={"tp": 2}),
    "zero3_pp_4": Case(4, layout={"pp": 2, "dp_shard": 2, "zero_stage": 3}),
    "cp_tp_4": Case(4, layout={"cp": 2, "tp": 2, "zero_stage": 1}),
    "tied_pp_2": Case(2, "tied", layout={"pp": 2}),
}


def scored(case: Case, mesh: Mesh, config: ParallelConfig) -> Any:
    """Score and extend random texts with random weights."""
    model = replace(MODELS[case.model], attention=case.attention)
    engine = evaluator(Saved(model, None, None, False, set(), lambda: random_weights(model)), mesh, config)
    generator, shape = np.random.default_rng(0), Shape(rows=2, row_len=32, context=24)
    ids = [generator.integers(0, 64, size, dtype=np.int32) for size in (5, 31, 60, 8, 2, 17, 9)]
    nll, _ = score(engine, [Encoded(one, 1 + len(one) // 3) for one in ids], shape)
    highest = list[float]()

    def choose(number: int, new: list[int], logits_V: Tensor) -> int | None:
        highest.append(float(logits_V.max()))
        return None if number == 1 and len(new) == 2 else int(logits_V.argmax())

    new = extend(engine, [one.tolist() for one in ids[:4]], shape, max_new_tokens=6, choose=choose)
    return nll, new, highest


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    model = Transformer(config)
    model.init_weights(3)
    return {name: 5 * param.detach() for name, param in model.named_parameters()}


@pytest.mark.slow
def test_scores_and_continuations_are_the_same_in_every_layout(tmp_path: Path) -> None:
    found = run(tmp_path, CASES, n_ranks=4, function=scored)
    for name, case in CASES.items():
        nll, new, highest = scored(case, Mesh(torch.device("cpu")), ParallelConfig())
        assert not isinstance(found[name], str), found[name]
        np.testing.assert_allclose(found[name][0], nll, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found[name][2], highest, atol=1e-4, err_msg=name)
        assert found[name][1] == new and list(map(len, new)) == [6, 2, 6, 6], name
