"""Generate text: python generate.py run=runs/demo prompt="def main("; or hf=folder, or prompts=file."""

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # no traceback on Ctrl-C during imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from conf.cli import run
from conf.schema import GenerateConfig
from data.tokenizer import INCOMPLETE, Tokenizer
from model.config import ModelError
from parallel.config import Device

if TYPE_CHECKING:
    from corpus.chat import Messages

Job = tuple[int, str, int]  # number of a prompt, its text, number of the sample
show = partial(print, end="", flush=True)


def main(config: GenerateConfig) -> None:
    """Print a text for each prompt, or hold a conversation."""
    is_open = config.prompt is None and config.prompts is None
    prompts = [] if is_open else read_prompts(config)
    writer = Writer(config)
    if is_open:
        return writer.converse()
    jobs = [(number, text, sample) for number, text in enumerate(prompts) for sample in range(config.samples)]
    if len(jobs) == 1:
        show("" if config.chat else prompts[0])
        writer.write(jobs, show)
        return print()
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        for (number, text, sample), new in zip(batch, writer.write(batch), strict=True):
            shown = f"{text}\n{new}" if config.chat else text + new
            print(f"--- prompt {number + 1}, sample {sample + 1}\n{shown}\n", flush=True)


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompt, or the non-blank lines of the prompts file; "-" is standard input."""
    if config.prompt not in (None, "-"):
        return [config.prompt]
    key, name = ("prompts", config.prompts) if config.prompt is None else ("prompt", "-")
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(str(name)).read_bytes()
        # Split as prepare_data.py does: only at line feeds, and without byte order marks.
        lines = [line.decode("utf-8-sig").removesuffix("\r") for line in raw.split(b"\n")]
    except OSError as error:
        raise ModelError(f"prompts ({name}): {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelError(f"{key} ({name}) is not UTF-8; save it as UTF-8") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ModelError(f"{key} ({name}) has no prompt; write one per line")
    return prompts if key == "prompts" else ["\n".join(lines).removesuffix("\n")]


class Writer:
    """A loaded model, which continues prompts as configured."""

    def __init__(self, config: GenerateConfig) -> None:
        import torch

        from tracking.store import local_run
        from training.load import open_saved
        from training.setup import DTYPES

        origin, device = str(config.run or config.hf), None if config.device is Device.auto else config.device.value
        if config.device is Device.cuda and not torch.cuda.is_available():
            raise ModelError("device (cuda): torch sees no CUDA device here; use device=cpu")
        saved = open_saved(local_run(origin, config.step), config.step)
        if saved.tokenizer is None:
            raise ModelError(f"{origin} has no tokenizer, which generate.py needs")
        if config.chat and saved.chat is None:
            raise ModelError(f"chat (true): {origin} has no chat template; prompt it without chat=true")
        self.config, self.saved, self.tokenizer = config, saved, saved.tokenizer
        self.model = saved.build(device, DTYPES[config.dtype.value])

    def converse(self) -> None:
        """Answer messages from stdin until its end; a trailing backslash continues a message on the next line."""
        history: Messages = []
        sign = "> " if sys.stdin.isatty() else ""
        with suppress(EOFError):
            while True:
                text = input(sign)
                while text.endswith("\\"):
                    text = text[:-1] + "\n" + input(sign)
                if text.strip():
                    answer = self.write([(0, text, 0)], show, history)[0]
                    print()
                    history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def prompt_ids(self, text: str, history: "Messages") -> list[int]:
        """Return the ids of a prompt, or with chat=true of the conversation up to the next answer."""
        if self.saved.chat is not None and self.config.chat:
            system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
            try:
                ids = self.saved.chat.prompt([*system, *history, {"role": "user", "content": text}])
            except ValueError as error:
                raise ModelError(f"chat (true): {error}") from None
        else:
            ids = self.tokenizer.encode(text)
        if self.saved.add_bos and self.tokenizer.bos_id is not None and ids[:1] != [self.tokenizer.bos_id]:
            ids = [self.tokenizer.bos_id, *ids]
        return ids or [self.tokenizer.eos_id or 0]  # an empty prompt starts after eos

    def write(
        self, jobs: list[Job], show: Callable[[str], object] = lambda _: None, history: "Messages | None" = None
    ) -> list[str]:
        """Continue the prompts of (number, prompt, sample) jobs in one batch; return the new texts.

        A text ends at a stop token or before a stop string. `show` gets the first job's text in pieces. With chat=true
        a prompt is a message that follows `history`.
        """
        from model.sampling import Sampling, generate

        config, most = self.config, self.model.config.max_seq_len - 1
        prompts = [self.prompt_ids(text, history or []) for _, text, _ in jobs]
        for (_, text, _), ids in zip(jobs, prompts, strict=True):
            if len(ids) > most:
                what = "the conversation" if history else f"prompt ({text[:40]}...)"
                raise ModelError(f"{what} has {len(ids)} tokens, more than {most}; shorten it")
        streams = [TextStream(self.tokenizer, ids, config.stop) for ids in prompts]

        def on_token(row: int, token: int) -> bool:
            piece = streams[row].add(token)
            if row == 0:
                show(piece)
            return streams[row].stopped

        generate(
            self.model,
            prompts,
            Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p),
            max_new_tokens=config.max_new_tokens,
            stop_ids=self.saved.stop_ids,
            seeds=[config.seed + 1_000_003 * number + sample for number, _, sample in jobs],
            vocab_size=self.tokenizer.vocab_size,
            use_cache=config.cache,
            on_token=on_token,
        )
        last = [stream.finish() for stream in streams]
        show(last[0])
        return [stream.text for stream in streams]


class TextStream:
    """Incremental decoding, which holds back incomplete characters and possible starts of stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str]) -> None:
        self.tokenizer, self.stops, self.ids = tokenizer, stops, list(prompt)
        # ids[start:end] are decoded again as context, because the text of a token depends on the previous ones.
        self.start, self.end = 0, len(prompt)
        self.text, self.stopped = "", False
        self.shown = 0  # characters returned so far

    def add(self, token: int) -> str:
        """Add a token; return new text that is final."""
        self.ids.append(token)
        return self._decode(held=max(map(len, self.stops), default=1) - 1)

    def finish(self) -> str:
        """Return the text that was held back, including incomplete characters."""
        return self._decode(held=0, whole=True)

    def _decode(self, *, held: int, whole: bool = False) -> str:
        """Return new text, without the last `held` characters."""
        decode = self.tokenizer.decode
        before, now = decode(self.ids[self.start : self.end]), decode(self.ids[self.start :])
        if not self.stopped and (whole or not now.endswith(INCOMPLETE)):
            # Invalid bytes can change the decoding of earlier ones; then decode without context.
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
