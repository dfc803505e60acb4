"""Let a model write: python generate.py run=runs/demo prompt="def main("; or hf=folder, or prompts=file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import hydra
from omegaconf import DictConfig

from conf.cli import report_user_errors, run
from conf.schema import GenerateConfig, stored_model, to_config
from model.config import ModelError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.transformer import Transformer

UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can write, with what its texts begin and end with."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    add_bos: bool
    stop_ids: set[int]  # of the end of a text, and of an answer


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    config: GenerateConfig = to_config(cfg)
    with report_user_errors():
        texts = read_prompts(config)
        loaded = load(config)
        jobs = [(number, text, sample) for number, text in enumerate(texts) for sample in range(config.samples)]
        if len(jobs) == 1:
            write(loaded, config, jobs, stream=sys.stdout)
            print()
            return
        for at in range(0, len(jobs), config.batch_size):
            part = jobs[at : at + config.batch_size]
            for (number, text, sample), new in zip(part, write(loaded, config, part), strict=True):
                print(f"--- prompt {number + 1}, sample {sample + 1}\n{text}{new}\n", flush=True)


def load(config: GenerateConfig) -> Loaded:
    """Open the model and its tokenizer, and find what its texts begin and end with."""
    import torch

    from corpus.chat import answer_end
    from data.tokenizer import adds_bos, load_tokenizer
    from model.hf.llama import read_hf, read_stop_ids
    from model.transformer import Transformer
    from training.checkpoint import open_checkpoint

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device (cuda): torch sees no CUDA device here; use device=cpu")
    if config.hf is not None:
        folder = Path(config.hf)
        model_config, weights = read_hf(folder)
        tokenizer, add_bos, stop_ids = load_tokenizer(folder), adds_bos(folder), read_stop_ids(folder)
    else:
        checkpoint = open_checkpoint(Path(str(config.run)))
        tokenizer = load_tokenizer(checkpoint.path.parent.parent / "tokenizer")
        model_config, weights = stored_model(checkpoint.state["config"]), checkpoint.read("model.")
        add_bos = bool(checkpoint.state["data"]["add_bos"])
        end = answer_end(tokenizer)
        stop_ids = set() if end is None else {end}
    if tokenizer.eos_id is not None:
        stop_ids.add(tokenizer.eos_id)
    with torch.device("meta"):
        model = Transformer(model_config)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype.value]
    model.load_state_dict({name: w.to(device, dtype) for name, w in weights.items()}, assign=True)
    return Loaded(model, tokenizer, add_bos, stop_ids)


def read_prompts(config: GenerateConfig) -> list[str]:
    """Give the prompt, or the lines of the file of prompts that are not blank."""
    if config.prompt is not None:
        return [config.prompt]
    path = Path(str(config.prompts))
    if not path.is_file():
        raise ModelError(f"prompts ({path}) is no file; name one that holds one prompt a line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"prompts ({path}) is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ModelError(f"prompts ({path}) holds no prompt")
    return lines


def write(
    loaded: Loaded,
    config: GenerateConfig,
    jobs: list[tuple[int, str, int]],
    stream: TextIO | None = None,
) -> list[str]:
    """Continue the prompts of some jobs together and give the new texts, each up to its end or stop string."""
    from model.sampling import Sampling, generate

    model, tokenizer = loaded.model, loaded.tokenizer
    bos = [tokenizer.bos_id] if loaded.add_bos and tokenizer.bos_id is not None else []
    prompts = [bos + tokenizer.encode(text) for _, text, _ in jobs]
    for (_, text, _), ids in zip(jobs, prompts, strict=True):
        if not ids:
            ids.append(tokenizer.eos_id or 0)  # an empty prompt: what comes after the end of a text
        if len(ids) >= model.config.max_seq_len:
            raise ModelError(
                f"the prompt {text[:40]!r}... has {len(ids)} tokens, "
                f"and the model reads at most {model.config.max_seq_len}; shorten it"
            )
    new_ids: list[list[int]] = [[] for _ in jobs]
    printer = Printer(stream, jobs[0][1], config.stop)

    def on_token(row: int, token: int) -> bool:
        new_ids[row].append(token)
        text = decode_after(tokenizer, prompts[row], new_ids[row])
        printer.show(until(text, config.stop))
        return any(stop in text for stop in config.stop)

    sampling = Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p)
    done = generate(
        model,
        prompts,
        sampling,
        max_new_tokens=config.max_new_tokens,
        stop_ids=loaded.stop_ids,
        seeds=[config.seed + 1_000_003 * number + sample for number, _, sample in jobs],
        vocab_size=tokenizer.vocab_size,
        use_cache=config.cache,
        on_token=on_token,
    )
    texts = [until(decode_after(tokenizer, p, ids), config.stop) for p, ids in zip(prompts, done, strict=True)]
    printer.finish(texts[0])
    return texts


def decode_after(tokenizer: "Tokenizer", prompt: list[int], new: list[int]) -> str:
    """Decode new tokens as they follow the prompt: the first may hold a space or the rest of a character."""
    before = tokenizer.decode(prompt[-4:])
    return tokenizer.decode(prompt[-4:] + new)[len(before) :]


def until(text: str, stops: list[str]) -> str:
    """Cut a text before the first of its stop strings."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


class Printer:
    """Shows one text while it grows: never half a character, nor a stop string that may be beginning."""

    def __init__(self, stream: TextIO | None, prompt: str, stops: list[str]) -> None:
        self.stream, self.shown = stream, 0
        self.held = max(map(len, stops), default=1) - 1
        self._print(prompt)

    def show(self, text: str) -> None:
        if self.stream is None or text.endswith(UNFINISHED):
            return
        end = len(text) - self.held
        if end > self.shown:
            self._print(text[self.shown : end])
            self.shown = end

    def finish(self, text: str) -> None:
        self._print(text[self.shown :])

    def _print(self, text: str) -> None:
        if self.stream is not None:
            print(text, end="", file=self.stream, flush=True)


if __name__ == "__main__":
    run(main, "generate")
