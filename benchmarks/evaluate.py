"""A task scored by us and by lm-evaluation-harness's `hf` model, from text, in one run on one device:

    python -m benchmarks.evaluate --tokenizer FOLDER [--model 1b] [--task hellaswag] [--theirs 0.3]

Both get the same weights, drawn at random, and the same texts. The harness's model takes the batch size that is the
fastest of several on a twentieth of the questions, and `--theirs` of the questions for its time. Log-likelihoods are
compared one by one; bf16 ones also with fp32 ones, on `--exact` questions. Where `lm_eval` cannot be imported, what its
model does stands in for it: requests sorted by length and padded, the log-softmax of all logits.
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.timing import synchronize, where
from conf.cli import CONF
from conf.schema import register, to_config
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.hf.families import export_family
from model.transformer import Transformer
from parallel.config import Compile, ParallelConfig
from parallel.mesh import Mesh
from training.config import Dtype
from training.load import Saved
from training.scoring import Encoded, encode, fitting_shape, score
from training.setup import build_evaluator
from training.tasks import Question, read_task, task_metrics

try:
    from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
except (ImportError, RuntimeError) as error:  # of what it needs, too
    HFLM, MISSING = None, str(error)

BATCH_SIZES = (16, 32, 64, 128, 256)
TRIED = 20  # every so many questions are those on which batch sizes are compared
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
T = TypeVar("T")


class Texts:
    """The continuations of questions after their contexts."""

    def __init__(self, questions: Sequence[Question], tokenizer: Tokenizer) -> None:
        self.questions = questions
        self.pairs = [pair for each in questions for pair in zip(each.contexts, each.continuations, strict=True)]
        self.encoded = encode(tokenizer, self.pairs, add_bos=False)
        self.n_targets = np.array([len(text.ids) - text.n_given for text in self.encoded])
        self.n_tokens = sum(len(text.ids) for text in self.encoded)

    def choices(self, ll: np.ndarray, *, per_character: bool) -> list[int]:
        """Return the likeliest continuation of each question."""
        sizes = [max(1, len(continuation.lstrip())) for _, continuation in self.pairs] if per_character else 1
        bounds = np.cumsum([0, *(len(question.continuations) for question in self.questions)]).tolist()
        return [int(np.argmax((ll / sizes)[start:end])) for start, end in pairwise(bounds)]


class Ours:
    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], dtype: str, batch_tokens: int) -> None:
        mesh = Mesh(next(iter(weights.values())).device)
        saved = Saved(config, None, None, False, set(), lambda: weights)
        parallel = ParallelConfig(
            compile=Compile.none if dtype == "fp32" else Compile.auto
        )  # which takes half a minute
        self.engine, self.batch_tokens = build_evaluator(saved, mesh, parallel, Dtype(dtype)), batch_tokens

    def score(self, encoded: Sequence[Encoded]) -> np.ndarray:
        return -np.array(score(self.engine, encoded, fitting_shape(self.engine, encoded, self.batch_tokens))[0])


class Harness:
    """The harness's `hf` model; `softmax` is its option `softmax_dtype`, without which it is of the model's dtype."""

    def __init__(self, model: Any, folder: Path, batch_size: int, softmax: str | None = None) -> None:
        self.model, self.batch_size, self.softmax = model, batch_size, softmax
        if HFLM is not None:
            ends = {"bos_token": "<s>", "eos_token": "</s>"}
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **ends)
            self.lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=softmax)

    def score(self, texts: Texts) -> np.ndarray:
        if HFLM is None:
            return padded(self.model, texts.encoded, self.batch_size)
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(texts.pairs)]
        return np.array([one for one, _ in self.lm.loglikelihood(requests, disable_tqdm=True)])

    def n_encoded_otherwise(self, texts: Texts) -> int:
        if HFLM is None:
            return 0
        theirs = [self.lm._encode_pair(*pair) for pair in texts.pairs]
        ours = [(text.ids[: text.n_given].tolist(), text.ids[text.n_given :].tolist()) for text in texts.encoded]
        return sum(one != tuple(other) for one, other in zip(ours, theirs, strict=True))


def padded(model: Any, encoded: Sequence[Encoded], batch_size: int) -> np.ndarray:
    """Return log-likelihoods as the harness's `hf` model computes them."""
    device, found = model.device, np.zeros(len(encoded))
    order = sorted(range(len(encoded)), key=lambda number: -len(encoded[number].ids))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            width = len(encoded[numbers[0]].ids) - 1
            rows = [np.pad(encoded[n].ids[:-1], (0, width - len(encoded[n].ids) + 1)) for n in numbers]
            log_probs = model(torch.from_numpy(np.stack(rows)).long().to(device)).logits.log_softmax(-1)
            for row, number in enumerate(numbers):
                ids, n_given = encoded[number]
                targets = torch.from_numpy(ids[n_given:]).long().to(device)
                here = log_probs[row, n_given - 1 : len(ids) - 1]
                found[number] = float(here.gather(1, targets[:, None]).sum())
    return found


def seconds(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def draw(config: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Return fp32 weights with a model's standard deviations; drawn on the device, which is faster than its own way."""
    model, weights = Transformer.on_meta(config), dict[str, torch.Tensor]()
    generator = torch.Generator(device).manual_seed(0)
    params, stds = dict(model.named_parameters()), model.init_stds()
    for name, param in params.items():
        if stds[name] is None:
            weights[name] = torch.full(param.shape, float(name.endswith("norm.weight")), device=device)
        else:
            weights[name] = torch.empty(param.shape, device=device).normal_(0, stds[name], generator=generator)
    return weights


def as_llama(config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    family = export_family(config)
    about = family.write_config(config, dtype="float32", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with next(iter(weights.values())).device:
        llama: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in about.items() if k != "architectures"}))
    names = {theirs: ours for ours, theirs in family.names(config).items()}
    for name, param in llama.named_parameters():
        param.data = weights[names[name]].to(dtype)  # not llama.to(dtype), which rounds the frequencies of positions
    return llama.eval()


def compare(what: str, texts: Texts, one: np.ndarray, other: np.ndarray) -> None:
    """Print how far log-likelihoods are from others, and how many questions are answered differently."""
    gaps = np.abs(one - other)
    per_token = gaps / texts.n_targets
    differ = [
        sum(a != b for a, b in zip(*(texts.choices(ll, per_character=norm) for ll in (one, other)), strict=True))
        for norm in (False, True)
    ]
    print(
        f"  {what:46} whole: mean {gaps.mean():.1e}, max {gaps.max():.1e}; per token: mean {per_token.mean():.1e}, "
        f"max {per_token.max():.1e}; relative: max {(gaps / np.abs(other)).max():.1e}; of {len(texts.questions):,} "
        f"questions {differ[0]} (acc) and {differ[1]} (acc_norm) answered differently",
        flush=True,
    )


def scores(texts: Texts, ll: np.ndarray) -> str:
    metrics = task_metrics(texts.questions, (-ll).tolist(), [False] * len(ll))
    return ", ".join(f"{key} {value:.6g}" for key, value in metrics.items())


def time_ours(
    ours: Ours, texts: Texts, tried: Texts, encoding: float, device: torch.device
) -> tuple[float, np.ndarray]:
    """Return the seconds of scoring, and the log-likelihoods."""
    shape = fitting_shape(ours.engine, texts.encoded, ours.batch_tokens)
    warm, _ = seconds(lambda: score(ours.engine, tried.encoded, shape), device)
    scoring, ll = seconds(lambda: ours.score(texts.encoded), device)
    print(
        f"ours     {encoding + scoring:7.2f} s: {encoding:.2f} s encoding, {scoring:.2f} s scoring, "
        f"{texts.n_tokens / scoring:,.0f} tokens/s; before, {warm:.0f} s to compile and warm up\n  {scores(texts, ll)}",
        flush=True,
    )
    return scoring, ll


def best_batch_size(llama: Any, folder: Path, tried: Texts, warm: Texts, device: torch.device) -> int:
    times = dict[int, float]()
    for size in BATCH_SIZES:
        if times and size > len(tried.pairs):
            break
        harness = Harness(llama, folder, size)
        try:
            harness.score(warm)
            times[size], _ = seconds(partial(harness.score, tried), device)
        except torch.OutOfMemoryError:
            break
        print(f"  batches of {size:4}: {times[size]:.2f} s for {len(tried.questions):,} questions", flush=True)
    return min(times, key=lambda size: times[size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json")
    parser.add_argument("--model", default="1b")
    parser.add_argument("--vocab-size", type=int, default=103_168, help="of the model")
    parser.add_argument("--task", default="hellaswag", help="a fetched task or a .jsonl[.gz] file")
    parser.add_argument("--questions", type=int, help="the first of them (default: all)")
    parser.add_argument("--theirs", type=float, default=1.0, help="share of the questions that the harness is timed on")
    parser.add_argument("--exact", type=int, default=200, help="questions that are scored in fp32, too")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype, folder = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32"), arguments.tokenizer
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model={arguments.model}", "data=random", f"model.vocab_size={arguments.vocab_size}"]
        config: ModelConfig = to_config(compose("train", overrides=overrides)).model
    weights, tokenizer = draw(config, device), load_tokenizer(folder)
    questions = read_task(arguments.task)[: arguments.questions]
    tried = Texts(questions[::TRIED], tokenizer)
    encoding, texts = seconds(lambda: Texts(questions, tokenizer), device)
    print(
        f"{where(device)}; {config.name}, {sum(w.numel() for w in weights.values()) / 1e9:.3g}e9 parameters, {dtype}\n"
        f"{len(questions):,} questions, {len(texts.pairs):,} requests, {texts.n_tokens:,} tokens, of which "
        f"{texts.n_tokens - int(texts.n_targets.sum()):,} context",
        flush=True,
    )
    scoring, ll = time_ours(Ours(config, weights, dtype, arguments.batch_tokens), texts, tried, encoding, device)
    empty_cache(device)

    print(
        "theirs: lm_eval.models.huggingface.HFLM" if HFLM is not None else f"theirs: imitated, as {MISSING}", flush=True
    )
    llama = as_llama(config, weights, DTYPES[dtype])
    best = best_batch_size(llama, folder, tried, Texts(questions[: 2 * TRIED], tokenizer), device)
    every = max(1, round(1 / arguments.theirs))
    part, harness = Texts(questions[::every], tokenizer), Harness(llama, folder, best)
    measured, their_ll = seconds(lambda: harness.score(part), device)
    theirs = measured * texts.n_tokens / part.n_tokens
    split, n_otherwise = seconds(lambda: harness.n_encoded_otherwise(tried), device)
    their_encoding = split * len(texts.pairs) / len(tried.pairs)
    print(
        f"theirs   {theirs:7.2f} s in batches of {best}, of which {their_encoding:.1f} s encoding"
        + (f" (scaled from {measured:.2f} s for {len(part.questions):,} questions)" if every > 1 else "")
        + f"; {n_otherwise} of {len(tried.pairs):,} requests have other ids\n  {scores(part, their_ll)}\n"
        f"ratio    {theirs / (encoding + scoring):7.2f}; of scoring alone {(theirs - their_encoding) / scoring:.2f}",
        flush=True,
    )

    print("log-likelihoods, differences of")
    compare(f"ours and theirs ({dtype})", part, ll[part_of(texts, every)], their_ll)
    some = max(1, len(questions) // arguments.exact)
    exact, ours_ll = Texts(questions[::some], tokenizer), ll[part_of(texts, some)]
    fp32_llama = as_llama(config, weights, torch.float32)
    fp32_ll = Harness(fp32_llama, folder, min(best, 64)).score(exact)
    ours_fp32_ll = Ours(config, weights, "fp32", arguments.batch_tokens // 4).score(exact.encoded)
    compare("ours and theirs (fp32)", exact, ours_fp32_ll, fp32_ll)
    if dtype != "fp32":
        precise_ll = Harness(llama, folder, min(best, 64), "float32").score(exact)
        compare(f"ours and theirs with softmax_dtype ({dtype})", exact, ours_ll, precise_ll)
        compare(f"ours ({dtype}) and theirs in fp32", exact, ours_ll, fp32_ll)
        compare(f"theirs with softmax_dtype ({dtype}) and in fp32", exact, precise_ll, fp32_ll)


def part_of(texts: Texts, step: int) -> np.ndarray:
    """Return the numbers of the texts of every `step`-th question."""
    sizes = [len(question.continuations) for question in texts.questions]
    return np.flatnonzero(np.repeat(np.arange(len(sizes)), sizes) % step == 0)


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
