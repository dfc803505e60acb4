"""Task scoring by this project and by lm-evaluation-harness's `hf` model, from text, in one run on one device:

    python -m benchmarks.evaluate --tokenizer FOLDER [--model 1b] [--task hellaswag] [--theirs 0.3]

Both use the same random weights and the same texts. The harness uses the fastest of several batch sizes, tuned on a
twentieth of the questions, and is timed on a share of `--theirs`. Log-likelihoods are compared per request; bf16 also
with fp32, on `--exact` questions. If `lm_eval` cannot be imported, its model is imitated: requests sorted by length and
padded, the log-softmax of all logits.
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

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
except (ImportError, RuntimeError) as error:  # also from its dependencies
    HFLM, MISSING = None, str(error)

BATCH_SIZES = (16, 32, 64, 128, 256)
TUNING_STRIDE = 20  # batch sizes are tuned on every 20th question
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
T = TypeVar("T")


class Texts:
    """The requests of questions: continuations after their contexts."""

    def __init__(self, questions: Sequence[Question], tokenizer: Tokenizer) -> None:
        self.questions = questions
        self.pairs = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
        self.encoded = encode(tokenizer, self.pairs, add_bos=False)
        self.n_targets = np.array([len(text.ids) - text.n_given for text in self.encoded])
        self.n_tokens = sum(len(text.ids) for text in self.encoded)

    def choices(self, ll: np.ndarray, *, per_character: bool) -> list[int]:
        """Return the likeliest continuation of each question."""
        sizes = [max(1, len(continuation.lstrip())) for _, continuation in self.pairs] if per_character else 1
        bounds = np.cumsum([0, *(len(question.continuations) for question in self.questions)]).tolist()
        return [int(np.argmax((ll / sizes)[start:end])) for start, end in pairwise(bounds)]


class Project:
    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], dtype: str, batch_tokens: int) -> None:
        mesh = Mesh(next(iter(weights.values())).device)
        saved = Saved(config, None, None, False, set(), lambda: weights)
        # compilation takes half a minute
        parallel = ParallelConfig(compile=Compile.none if dtype == "fp32" else Compile.auto)
        self.engine, self.batch_tokens = build_evaluator(saved, mesh, parallel, Dtype(dtype)), batch_tokens

    def score(self, encoded: Sequence[Encoded]) -> np.ndarray:
        return -np.array(score(self.engine, encoded, fitting_shape(self.engine, encoded, self.batch_tokens))[0])


class Harness:
    """The harness's `hf` model; `softmax` is the option `softmax_dtype`, None for the model's dtype."""

    def __init__(self, model: Any, folder: Path, batch_size: int, softmax: str | None = None) -> None:
        self.model, self.batch_size, self.softmax = model, batch_size, softmax
        if HFLM is not None:
            ends = {"bos_token": "<s>", "eos_token": "</s>"}
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **ends)
            hf_model = cast(Any, HFLM)  # its constructor's arguments are declared in part
            self.lm = hf_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=softmax)

    def score(self, texts: Texts) -> np.ndarray:
        if HFLM is None:
            return padded(self.model, texts.encoded, self.batch_size)
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts.pairs)]
        return np.array([ll for ll, _ in self.lm.loglikelihood(requests, disable_tqdm=True)])

    def n_other_ids(self, texts: Texts) -> int:
        if HFLM is None:
            return 0
        harness_ids = [self.lm._encode_pair(*pair) for pair in texts.pairs]
        ids = [(text.ids[: text.n_given].tolist(), text.ids[text.n_given :].tolist()) for text in texts.encoded]
        return sum(a != tuple(b) for a, b in zip(ids, harness_ids, strict=True))


def padded(model: Any, encoded: Sequence[Encoded], batch_size: int) -> np.ndarray:
    """Return log-likelihoods as the harness's `hf` model computes them."""
    device, found = model.device, np.zeros(len(encoded))
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].ids))
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            width = len(encoded[indices[0]].ids) - 1
            rows = [np.pad(encoded[n].ids[:-1], (0, width - len(encoded[n].ids) + 1)) for n in indices]
            log_probs = model(torch.from_numpy(np.stack(rows)).long().to(device)).logits.log_softmax(-1)
            for row, index in enumerate(indices):
                ids, n_given = encoded[index]
                targets = torch.from_numpy(ids[n_given:]).long().to(device)
                target_log_probs = log_probs[row, n_given - 1 : len(ids) - 1]
                found[index] = float(target_log_probs.gather(1, targets[:, None]).sum())
    return found


def seconds(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def random_weights(config: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random fp32 weights with a model's standard deviations, drawn on the device, which is fast."""
    model, weights = Transformer.on_meta(config), dict[str, torch.Tensor]()
    generator = torch.Generator(device).manual_seed(0)
    params, stds = dict(model.named_parameters()), model.init_stds()
    for name, param in params.items():
        if (std := stds[name]) is None:
            weights[name] = torch.full(param.shape, float(name.endswith("norm.weight")), device=device)
        else:
            weights[name] = torch.empty(param.shape, device=device).normal_(0, std, generator=generator)
    return weights


def as_llama(config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    family = export_family(config)
    hf_config = family.write_config(config, dtype="float32", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with next(iter(weights.values())).device:
        llama: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in hf_config.items() if k != "architectures"}))
    names = {hf_name: name for name, hf_name in family.names(config).items()}
    for name, param in llama.named_parameters():
        param.data = weights[names[name]].to(dtype)  # not llama.to(dtype), which rounds the rotary frequencies
    return llama.eval()


def compare(title: str, texts: Texts, ll: np.ndarray, other_ll: np.ndarray) -> None:
    """Print the differences of log-likelihoods, and how many questions are answered differently."""
    gaps = np.abs(ll - other_ll)
    per_token = gaps / texts.n_targets
    differ = [
        sum(a != b for a, b in zip(*(texts.choices(x, per_character=norm) for x in (ll, other_ll)), strict=True))
        for norm in (False, True)
    ]
    print(
        f"  {title:50} total: mean {gaps.mean():.1e}, max {gaps.max():.1e}; per token: mean {per_token.mean():.1e}, "
        f"max {per_token.max():.1e}; relative: max {(gaps / np.abs(other_ll)).max():.1e}; of {len(texts.questions):,} "
        f"questions {differ[0]} (acc) and {differ[1]} (acc_norm) answered differently",
        flush=True,
    )


def scores(texts: Texts, ll: np.ndarray) -> str:
    metrics = task_metrics(texts.questions, (-ll).tolist(), [False] * len(ll))
    return ", ".join(f"{key} {value:.6g}" for key, value in metrics.items())


def time_project(
    scorer: Project, texts: Texts, tuning: Texts, encoding_s: float, device: torch.device
) -> tuple[float, np.ndarray]:
    """Return the seconds of scoring, and the log-likelihoods."""
    shape = fitting_shape(scorer.engine, texts.encoded, scorer.batch_tokens)
    warm_s, _ = seconds(lambda: score(scorer.engine, tuning.encoded, shape), device)
    scoring_s, ll = seconds(lambda: scorer.score(texts.encoded), device)
    print(
        f"project  {encoding_s + scoring_s:7.2f} s: {encoding_s:.2f} s encoding, {scoring_s:.2f} s scoring, "
        f"{texts.n_tokens / scoring_s:,.0f} tokens/s; {warm_s:.0f} s to compile and warm up\n  {scores(texts, ll)}",
        flush=True,
    )
    return scoring_s, ll


def best_batch_size(llama: Any, folder: Path, tuning: Texts, warm: Texts, device: torch.device) -> int:
    times = dict[int, float]()
    for size in BATCH_SIZES:
        if times and size > len(tuning.pairs):
            break
        harness = Harness(llama, folder, size)
        try:
            harness.score(warm)
            times[size], _ = seconds(partial(harness.score, tuning), device)
        except torch.OutOfMemoryError:
            break
        print(f"  batches of {size:4}: {times[size]:.2f} s for {len(tuning.questions):,} questions", flush=True)
    return min(times, key=lambda size: times[size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json")
    parser.add_argument("--model", default="1b")
    parser.add_argument("--vocab-size", type=int, default=103_168, help="of the model")
    parser.add_argument("--task", default="hellaswag", help="a fetched task or a .jsonl[.gz] file")
    parser.add_argument("--questions", type=int, help="number of questions, from the first (default: all)")
    parser.add_argument("--theirs", type=float, default=1.0, help="share of questions to time the harness on")
    parser.add_argument("--exact", type=int, default=200, help="number of questions also scored in fp32")
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
    weights, tokenizer = random_weights(config, device), load_tokenizer(folder)
    questions = read_task(arguments.task)[: arguments.questions]
    tuning = Texts(questions[::TUNING_STRIDE], tokenizer)
    encoding_s, texts = seconds(lambda: Texts(questions, tokenizer), device)
    print(
        f"{where(device)}; {config.name}, {sum(w.numel() for w in weights.values()) / 1e9:.3g}e9 parameters, {dtype}\n"
        f"{len(questions):,} questions, {len(texts.pairs):,} requests, {texts.n_tokens:,} tokens, of which "
        f"{texts.n_tokens - int(texts.n_targets.sum()):,} context",
        flush=True,
    )
    project = Project(config, weights, dtype, arguments.batch_tokens)
    scoring_s, ll = time_project(project, texts, tuning, encoding_s, device)
    empty_cache(device)

    print(
        "harness: lm_eval.models.huggingface.HFLM" if HFLM is not None else f"harness: imitated ({MISSING})", flush=True
    )
    llama = as_llama(config, weights, DTYPES[dtype])
    best = best_batch_size(llama, folder, tuning, Texts(questions[: 2 * TUNING_STRIDE], tokenizer), device)
    every = max(1, round(1 / arguments.theirs))
    part, harness = Texts(questions[::every], tokenizer), Harness(llama, folder, best)
    measured_s, harness_ll = seconds(lambda: harness.score(part), device)
    harness_s = measured_s * texts.n_tokens / part.n_tokens
    tuning_s, n_other_ids = seconds(lambda: harness.n_other_ids(tuning), device)
    harness_encoding_s = tuning_s * len(texts.pairs) / len(tuning.pairs)
    harness_scoring_s = harness_s - harness_encoding_s
    print(
        f"harness  {harness_s:7.2f} s with batch size {best}, of which {harness_encoding_s:.1f} s encoding"
        + (f" (scaled from {measured_s:.2f} s for {len(part.questions):,} questions)" if every > 1 else "")
        + f"; {n_other_ids} of {len(tuning.pairs):,} requests have other ids\n  {scores(part, harness_ll)}\n"
        f"ratio    {harness_s / (encoding_s + scoring_s):7.2f}; without encoding {harness_scoring_s / scoring_s:.2f}",
        flush=True,
    )

    print("differences of log-likelihoods")
    compare(f"project and harness ({dtype})", part, ll[part_of(texts, every)], harness_ll)
    some = max(1, len(questions) // arguments.exact)
    exact, project_ll = Texts(questions[::some], tokenizer), ll[part_of(texts, some)]
    fp32_llama = as_llama(config, weights, torch.float32)
    fp32_ll = Harness(fp32_llama, folder, min(best, 64)).score(exact)
    project_fp32_ll = Project(config, weights, "fp32", arguments.batch_tokens // 4).score(exact.encoded)
    compare("project and harness (fp32)", exact, project_fp32_ll, fp32_ll)
    if dtype != "fp32":
        precise_ll = Harness(llama, folder, min(best, 64), "float32").score(exact)
        compare(f"project and harness with softmax_dtype ({dtype})", exact, project_ll, precise_ll)
        compare(f"project ({dtype}) and harness in fp32", exact, project_ll, fp32_ll)
        compare(f"harness with softmax_dtype ({dtype}) and in fp32", exact, precise_ll, fp32_ll)


def part_of(texts: Texts, step: int) -> np.ndarray:
    """Return the indices of the texts of every `step`-th question."""
    sizes = [len(question.continuations) for question in texts.questions]
    return np.flatnonzero(np.repeat(np.arange(len(sizes)), sizes) % step == 0)


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
