"""Conversations to token ids by a Jinja chat template, with a loss mask of the assistant's turns."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np

from corpus.config import DataError
from data.tokenizer import ANCHOR, CHAT_TEMPLATE, Tokenizer

# Dicts of role, content and other fields of a message; the first also has the record's tools.
Messages = list[dict[str, Any]]

# The text between generation markers is trained on: an answer and its end token.
TEMPLATES = {
    "internlm": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        r"{{ '<|Bot|>:' }}{% generation %}{{ message['content'] + '<eoa>\n' }}{% endgeneration %}"
        "{% else %}"
        r"{{ ('<|System|>:' if message['role'] == 'system' else '<|User|>:') + message['content'] + '<eoh>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
    ),
    "chatml": (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        r"{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        r"{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
# The special tokens of a built-in template, the last of which ends an answer.
MARKERS = {TEMPLATES["internlm"]: ("<eoh>", "<eoa>"), TEMPLATES["chatml"]: ("<|im_start|>", "<|im_end|>")}
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
CALLS = ("tool_calls", "function_call")
WRITTEN = ("tools", *CALLS)  # fields that a template must not ignore
PRIVATE_USE = range(0xF0000, 0xFFFFD)
MARK = chr(PRIVATE_USE[0])
MOST_KEY_CHARS = 200  # of a record's keys, in an error message


def read_template(name: str) -> str:
    """Return a built-in template or read it from a .jinja file, a tokenizer_config.json, or a folder with either."""
    template: Any = TEMPLATES.get(name)
    path = Path(name)
    if path.is_dir():
        path = path / (CHAT_TEMPLATE if (path / CHAT_TEMPLATE).exists() else "tokenizer_config.json")
    if template is None and path.is_file() and path.suffix in (".jinja", ".json"):
        try:
            text = path.read_text(encoding="utf-8")
            template = lookup(json.loads(text), "chat_template") if path.suffix == ".json" else text
        except ValueError as error:
            raise DataError(f"data.chat_template ({path}) cannot be read: {error}") from None
    if isinstance(template, list):  # named templates
        template = next((lookup(entry, "template") for entry in template if lookup(entry, "name") == "default"), None)
    if not isinstance(template, str):
        known = f"{', '.join(TEMPLATES)}, a .jinja file, a tokenizer_config.json, or a folder with either"
        raise DataError(f"data.chat_template ({name}) has no template; name one of {known}")
    return template


def messages_of(record: Any, style: Literal["alpaca", "chat"], key: str = "messages") -> Messages:
    """Return a record's conversation; raise `ValueError` if there is no answer to train on."""
    if style == "alpaca":
        if lookup(record, "history"):
            raise ValueError("history has messages, which data.style alpaca ignores; use data.style=chat")
        question, answer = (_string(record, field) for field in ("instruction", "output"))
        if lookup(record, "input"):
            question += "\n" + _string(record, "input")
        messages: Messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        turns = lookup(record, key)
        if turns == []:
            raise ValueError(f"data.messages_key ({key}) is empty")
        if not isinstance(turns, list):
            raise ValueError(describe_missing(record, key, "a list of messages", "data.messages_key"))
        messages = [_message(turn) for turn in turns]
    if lookup(record, "system"):
        messages.insert(0, {"role": "system", "content": _string(record, "system")})
    answers = (m for m in messages if m["role"] == "assistant" and m.get("weight", 1))
    if not any(message["content"].strip() or any(call in message for call in CALLS) for message in answers):
        raise ValueError("no message of the assistant")
    tools = lookup(record, "tools") or lookup(record, "functions")
    if tools := json.loads(tools) if isinstance(tools, str) else tools:
        messages[0]["tools"] = tools
    return messages


def _message(turn: Any) -> dict[str, Any]:
    role, content = ("role", "content") if lookup(turn, "from") is None else ("from", "value")
    if (name := _string(turn, role)) not in ROLES:
        raise ValueError(f"unknown role {name!r}; roles are {', '.join(ROLES)}")
    standard = ("role", "content", "from", "value")
    extra = {key: value for key, value in turn.items() if key not in standard and value not in (None, "", [], {})}
    if extra.get("weight", 1) not in (0, 1):
        raise ValueError(f"weight ({extra['weight']}) must be 0 or 1")
    is_call = lookup(turn, content) is None and any(call in extra for call in CALLS)
    return {"role": ROLES[name], "content": "" if is_call else _string(turn, content), **extra}


def _string(record: Any, field: str) -> str:
    value = lookup(record, field)
    if not isinstance(value, str):
        raise ValueError(describe_missing(record, field, "a string"))
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{field} has a lone surrogate")
    return value


def lookup(record: Any, dotted: str) -> Any:
    """Return a record's value at a dotted key, or None."""
    for part in dotted.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def describe_missing(record: Any, key: str, wanted: str, setting: str = "") -> str:
    """Return an error message for a record's key, named by `setting`, that is missing or of the wrong type."""
    keys = f" with {', '.join(map(str, record))[:MOST_KEY_CHARS] or 'no keys'}" if isinstance(record, dict) else ""
    found = f"{type(lookup(record, key)).__name__}, in a record of type {type(record).__name__}{keys}"
    return f"{f'{setting} ({key})' if setting else key} must be {wanted}, not {found}"


def chat_encoder(tokenizer: Tokenizer) -> "ChatEncoder | None":
    """Return the encoder of the chat template next to a tokenizer; None without a usable one."""
    with suppress(DataError):
        return ChatEncoder(read_template(str(tokenizer.path.parent.absolute())), tokenizer)


class ChatEncoder:
    """Encodes conversations with a template.

    Targets and the rest are encoded separately, so that no token spans both. Control tokens of the template become
    their ids; the same names within a message are encoded as text, so that a user cannot end a turn by typing `</s>`.
    User-defined pieces (SentencePiece) and added tokens that are not special (Hugging Face) are matched in messages
    too. A tokenizer's prefix space is added only at the start of the conversation.
    """

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        ids = tokenizer.special_ids
        if missing := [marker for marker in MARKERS.get(template, ()) if marker not in ids]:
            lacks = f"data.chat_template writes {' and '.join(missing)}, which {tokenizer.path.name} lacks"
            raise DataError(f'{lacks}; pass "tokenizer.add_special_tokens={missing}"')
        self.template, self.special = template, set(ids.values())
        self.marked = GENERATION.search(template) is not None
        self.spell, self.bos_id = tokenizer.encode, tokenizer.bos_id
        # Other special tokens are matched by the tokenizer itself, which may depend on the surrounding text.
        self.controls = {name: token for name, token in ids.items() if token not in self.spell(name)}
        longest_first = sorted(map(re.escape, self.controls), key=len, reverse=True)
        self.names = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        by_id = {token: name for name, token in ids.items()}
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self.variables: dict[str, Any] = {key: by_id[token] for key, token in named.items() if token in by_id}
        self.spell_inside = tokenizer.encode_inside

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """Return a conversation's ids, uint32 (T,), and its loss mask, bool (T,), True for targets.

        Raises `ValueError` for a conversation that the template rejects or that has no answer, and `DataError` for a
        template without markers whose answers cannot be located.
        """
        written = json.dumps(messages, ensure_ascii=False, default=str)
        mark = next(char for char in map(chr, PRIVATE_USE) if char not in self.template + written)
        # A mark inside control token names of messages tells them from those of the template after rendering.
        messages = json.loads(self.names.sub(lambda name: mark.join([*name[0], ""]), written))
        text, spans = self._render(messages)
        if not self.marked:
            spans = list(self._answers(messages, text))
        if not any(start < end for start, end in spans):
            raise ValueError("the chat template marks no answer")
        weights = [bool(message.get("weight", 1)) for message in messages if message["role"] == "assistant"]
        if len(weights) != len(spans) and not all(weights):
            raise ValueError(f"weight: the chat template marks {len(spans)} answers of {len(weights)}")
        weights = weights if len(weights) == len(spans) else [True] * len(spans)
        ids: list[int] = []
        loss_mask: list[bool] = []
        done = 0
        for (start, end), is_answer in zip([*spans, (len(text), len(text))], [*weights, False], strict=True):
            for part, is_target in ((text[done:start], False), (text[start:end], is_answer)):
                ids += self._part_ids(part, mark, first=not ids)
                loss_mask += [is_target] * (len(ids) - len(loss_mask))
            done = end
        return np.array(ids, dtype=np.uint32), np.array(loss_mask, dtype=bool)

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids of the prompt for the next answer; raise `ValueError` if the template rejects it."""
        self.check_written(messages)
        try:
            ids, mask = self.encode([*messages, {"role": "assistant", "content": "x"}])
        except DataError:  # such a template cannot train here; encode as transformers does
            return self._part_ids(self._render(messages, prompt=True)[0], MARK, first=True)
        last = np.flatnonzero(mask)[-1]
        return ids[: np.flatnonzero(~mask[:last])[-1] + 1].tolist()

    def answer_end(self) -> int | None:
        """Return the first special token after an answer, if it is a target."""
        try:
            text, spans = self._render([{"role": "user", "content": "x"}, {"role": "assistant", "content": ANCHOR}])
        except ValueError:
            return None
        after = (text[: spans[-1][1]] if spans else text).rpartition(ANCHOR)[2]
        return next((token for token in self._part_ids(after, MARK, first=False) if token in self.special), None)

    def template_with_bos(self) -> str:
        """Return the template with bos prepended, unless it writes bos itself."""
        ids = self._part_ids(self._render([{"role": "user", "content": "x"}], prompt=True)[0], MARK, first=True)
        return self.template if ids[:1] == [self.bos_id] else "{{ bos_token }}" + self.template

    def check_written(self, messages: Messages) -> None:
        """Raise `ValueError` if the template ignores tools, calls, a role, or the content of a system message."""
        original = ""
        for n, message in enumerate(messages):
            role = message["role"]
            changes: list[tuple[str, dict[str, Any]]] = [(key, {key: None}) for key in WRITTEN if key in message]
            if role not in ("user", "assistant"):
                changes += [(f"the role of {role}", {"role": other}) for other in ("user", "assistant")]
            if changes and message["content"]:
                changes.append((f"the content of {role}", {"content": message["content"] + "x"}))
            for what, change in changes:
                original = original or self._render(messages)[0]
                try:
                    changed, _ = self._render([*messages[:n], message | change, *messages[n + 1 :]])
                except ValueError:
                    continue  # not ignored
                if changed == original:
                    raise ValueError(f"the chat template leaves out {what}")

    def _render(self, messages: Messages, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {"return_assistant_tokens_mask": self.marked, "add_generation_prompt": prompt, **self.variables}
        options["tools"] = messages[0].get("tools") if messages else None
        try:
            rendered: Any = render_jinja_template([messages], chat_template=self.template, **options)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.chat_template: line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template rejects it: {error}") from None
        return rendered[0][0], rendered[1][0] if self.marked else []

    def _answers(self, messages: Messages, text: str) -> Iterator[tuple[int, int]]:
        """Yield the span of each answer: what the rendered conversation has beyond its prompt."""
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._render(messages[:k], prompt=True)
                after, _ = self._render(messages[: k + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    advice = "mark them by {% generation %} and {% endgeneration %}"
                    raise DataError(f"data.chat_template: answers cannot be found turn by turn; {advice}")
                yield len(before), len(after)

    def _part_ids(self, part: str, mark: str, *, first: bool) -> list[int]:
        ids: list[int] = []
        for k, text in enumerate(self.names.split(part)):  # text, name, text, ..., text
            text = text.replace(mark, "")
            if k % 2:
                ids.append(self.controls[text])
            else:
                ids += self.spell(text) if first and not ids else self.spell_inside(text)
        return ids
