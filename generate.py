"""Write text with a model: python generate.py run=runs/demo prompt="def main("; or hf=folder, or prompts=file."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # Ctrl-C while modules load ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from omegaconf import DictConfig

from conf.cli import checked, report_user_errors, run
from conf.schema import GenerateConfig
from model.config import ModelError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from model.transformer import Transformer
    from training.load import Saved

INCOMPLETE = "\ufffd"  # what the bytes of half a character decode to


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    with report_user_errors():
        config: GenerateConfig = checked(cfg)
        prompts = read_prompts(config)
        saved, model = load_model(config)
        jobs = [(number, text, sample) for number, text in enumerate(prompts) for sample in range(config.samples)]
        if len(jobs) == 1:
            print(prompts[0], end="", flush=True)
            write(model, saved, config, jobs, partial(print, end="", flush=True))
            print()
            return
        for start in range(0, len(jobs), config.batch_size):
            batch = jobs[start : start + config.batch_size]
            for (number, text, sample), new in zip(batch, write(model, saved, config, batch), strict=True):
                print(f"--- prompt {number + 1}, sample {sample + 1}\n{text}{new}\n", flush=True)


def load_model(config: GenerateConfig) -> "tuple[Saved, Transformer]":
    import torch

    from training.load import open_saved
    from training.setup import DTYPES

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device (cuda): torch sees no CUDA device here; use device=cpu")
    saved = open_saved(Path(str(config.run or config.hf)))
    if saved.tokenizer is None:
        raise ModelError(f"{config.run or config.hf} has no tokenizer, which generate.py needs")
    return saved, saved.build(None if config.device == "auto" else config.device, DTYPES[config.dtype.value])


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompt, or the lines of the file of prompts that are not blank."""
    if config.prompt is not None:
        return [config.prompt]
    path = Path(str(config.prompts))
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise ModelError(f"prompts ({path}): {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"prompts ({path}) is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not lines:
        raise ModelError(f"prompts ({path}) has no prompt; write one per line")
    return lines


def write(
    model: "Transformer",
    saved: "Saved",
    config: GenerateConfig,
    jobs: list[tuple[int, str, int]],
    show: Callable[[str], object] = lambda _: None,
) -> list[str]:
    """Continue the prompts of (number, prompt, sample) jobs together; return the new texts.

    A text ends at a stop token or before a stop string. `show` gets the first job's text piece by piece.
    """
    from model.sampling import Sampling, generate

    tokenizer = saved.tokenizer
    assert tokenizer is not None  # checked by load_model
    bos = [tokenizer.bos_id] if saved.add_bos and tokenizer.bos_id is not None else []
    # An empty prompt continues the end of a text.
    prompts = [bos + tokenizer.encode(text) or [tokenizer.eos_id or 0] for _, text, _ in jobs]
    most = model.config.max_seq_len - 1
    for (_, text, _), ids in zip(jobs, prompts, strict=True):
        if len(ids) > most:
            raise ModelError(f"prompt ({text[:40]}...) has {len(ids)} tokens, more than {most}; shorten it")
    streams = [TextStream(tokenizer, ids, config.stop) for ids in prompts]

    def on_token(row: int, token: int) -> bool:
        piece = streams[row].add(token)
        if row == 0:
            show(piece)
        return streams[row].stopped

    generate(
        model,
        prompts,
        Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p),
        max_new_tokens=config.max_new_tokens,
        stop_ids=saved.stop_ids,
        seeds=[config.seed + 1_000_003 * number + sample for number, _, sample in jobs],
        vocab_size=tokenizer.vocab_size,
        use_cache=config.cache,
        on_token=on_token,
    )
    last = [stream.finish() for stream in streams]
    show(last[0])
    return [stream.text for stream in streams]


class TextStream:
    """Decodes a text token by token, and holds back unfinished characters and what may begin a stop string."""

    def __init__(self, tokenizer: "Tokenizer", prompt: list[int], stops: list[str]) -> None:
        self.tokenizer, self.stops, self.ids = tokenizer, stops, list(prompt)
        # ids[start:end] are decoded again as context: what a token is written as depends on those before it.
        self.start, self.end = 0, len(prompt)
        self.text, self.stopped = "", False
        self.shown = 0  # characters

    def add(self, token: int) -> str:
        """Take the next token; return the text that can be shown since the last time."""
        self.ids.append(token)
        return self._decode(held=max(map(len, self.stops), default=1) - 1)

    def finish(self) -> str:
        """Return what was held back, unfinished characters too."""
        return self._decode(held=0, whole=True)

    def _decode(self, *, held: int, whole: bool = False) -> str:
        """Return what is new in the text, but for its last `held` characters."""
        decode = self.tokenizer.decode
        before, now = decode(self.ids[self.start : self.end]), decode(self.ids[self.start :])
        if not self.stopped and (whole or not now.endswith(INCOMPLETE)):
            # Wrong bytes change how right ones before them are decoded, which then are no context.
            new = now.removeprefix(before) if now.startswith(before) else decode(self.ids[self.end :])
            self.start, self.end = self.end if new else self.start, len(self.ids)
            self.text += new
            if found := [at for stop in self.stops if (at := self.text.find(stop)) >= 0]:
                self.text, self.stopped = self.text[: min(found)], True
        end = max(self.shown, len(self.text) - (0 if self.stopped else held))
        piece, self.shown = self.text[self.shown : end], end
        return piece


if __name__ == "__main__":
    run(main, "generate")
