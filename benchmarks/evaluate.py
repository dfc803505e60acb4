"""HellaSwag-shaped requests scored by us and as lm-evaluation-harness's `hf` model does, in one run on one device:

    python -m benchmarks.evaluate [--model 1b] [--questions 10042]

Four endings per question; lengths are drawn like HellaSwag's in a vocabulary of about 100,000. The other side is
transformers' model with the same weights: requests sorted by length and padded, the log-softmax of all logits, at the
best of several batch sizes. No text: both get the same ids.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import synchronize, where
from conf.cli import CONF
from conf.schema import register, to_config
from model.config import ModelConfig
from model.hf.families import export_family
from model.transformer import Transformer
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from training.config import Dtype
from training.load import Saved
from training.scoring import Encoded, fitting_shape, score
from training.setup import build_evaluator

BATCH_SIZES = (16, 32, 64, 128, 256)
TRIED = 0.1  # share of the requests on which batch sizes are compared


def requests(n_questions: int, vocab_size: int) -> list[Encoded]:
    """Return four continuations of about 25 tokens for each context of about 50."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(n_questions):
        context = draw.integers(3, vocab_size, int(np.clip(draw.gamma(3, 17), 5, 110)), dtype=np.int32)
        for size in np.clip(draw.gamma(4, 6, 4), 3, 70).astype(int):
            ending = draw.integers(3, vocab_size, size, dtype=np.int32)
            found.append(Encoded(np.concatenate([context, ending]), len(context)))
    return found


def padded(model: LlamaForCausalLM, texts: Sequence[Encoded], batch_size: int) -> list[float]:
    """Return log-likelihoods as the harness's `hf` model computes them."""
    device, found = model.device, [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            width = len(texts[numbers[0]].ids) - 1
            rows = [np.pad(texts[n].ids[:-1], (0, width - len(texts[n].ids) + 1)) for n in numbers]
            tokens_BT = torch.from_numpy(np.stack(rows)).long().to(device)
            log_probs = model(tokens_BT).logits.log_softmax(-1, dtype=torch.float32)
            for row, number in enumerate(numbers):
                ids, n_given = texts[number]
                targets = torch.from_numpy(ids[n_given:]).long().to(device)
                here = log_probs[row, n_given - 1 : len(ids) - 1]
                found[number] = float(here.gather(1, targets[:, None]).sum())
    return found


def seconds(work: Callable[[], Sequence[float]], device: torch.device) -> tuple[float, Sequence[float]]:
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--questions", type=int, default=10_042)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        size = ["model.vocab_size=103168"] if arguments.model != "tiny" else []
        config: ModelConfig = to_config(
            compose("train", overrides=[f"model={arguments.model}", "data=random", *size])
        ).model
    model = Transformer(config)
    model.init_weights(0)
    weights = {name: param.detach() for name, param in model.named_parameters()}
    texts = requests(arguments.questions, config.vocab_size)
    n_tokens = sum(len(text.ids) for text in texts)
    print(f"{where(device)}; {config.name}, {len(texts):,} requests, {n_tokens:,} tokens")

    dtype = Dtype.bf16 if device.type == "cuda" else Dtype.fp32
    engine = build_evaluator(
        Saved(config, None, None, False, set(), lambda: weights), Mesh(device), ParallelConfig(), dtype
    )
    shape = fitting_shape(engine, texts, arguments.batch_tokens)
    first, _ = seconds(lambda: score(engine, texts[: len(texts) // 20], shape)[0], device)
    ours, nll = seconds(lambda: score(engine, texts, shape)[0], device)
    print(f"ours           {ours:7.1f} s  {n_tokens / ours:10,.0f} tokens/s  (compiled and warm in {first:.0f} s)")

    family = export_family(config)
    about = family.write_config(config, dtype="float32", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    llama: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in about.items() if k != "architectures"}))
    llama.load_state_dict({theirs: weights[name] for name, theirs in family.names(config).items()}, strict=False)
    llama = llama.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    some = texts[:: int(1 / TRIED)]
    tried: dict[int, float] = {}
    for batch_size in BATCH_SIZES:
        try:
            padded(llama, some[: 2 * batch_size], batch_size)
            tried[batch_size], _ = seconds(lambda size=batch_size: padded(llama, some, size), device)
        except torch.OutOfMemoryError:
            break
    best = min(tried, key=lambda size: tried[size])
    theirs, log_likelihoods = seconds(lambda: padded(llama, texts, best), device)
    worst = max(abs(one + other) for one, other in zip(nll, log_likelihoods, strict=True))
    largest = max(abs(one) for one in log_likelihoods)
    print(f"transformers   {theirs:7.1f} s  {n_tokens / theirs:10,.0f} tokens/s  (batches of {best})")
    print(f"ratio          {theirs / ours:7.2f}; log-likelihoods of up to {largest:.0f} differ by at most {worst:.1e}")


if __name__ == "__main__":
    main()
