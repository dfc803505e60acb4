"""Conversations become the ids of their text, and only the assistant's turns are trained on."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from corpus.chat import MARKERS, TEMPLATES, ChatEncoder, Messages, read_template
from corpus.config import DataError
from data.tokenizer import Tokenizer
from tests.corpora import exported, remade
from tests.corpus.conftest import SYMBOLS

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "晴朗\n  and then 😀?"},
    {"role": "assistant", "content": "Naïve café.\n\n    indented"},
]
INTERNLM_TEXT = (
    "<|System|>:Be brief.<eoh>\n<|User|>:What is 12 + 30?<eoh>\n<|Bot|>:It is 42.<eoa>\n"
    "<|User|>:晴朗\n  and then 😀?<eoh>\n<|Bot|>:Naïve café.\n\n    indented<eoa>\n"
)
CHATML_TEXT = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TURNS)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %}{% generation %}{{ m['content'] | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
RICH = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }} {{ m.name or '' }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% endif %}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
# Where a content holds a control token's name transformers lets it be one, and here it is text.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")).filter(
    lambda text: not re.search("<(unk|/?s)>", text)
)


def two(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def unmarked(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


@pytest.fixture(scope="module")
def fast(pieces: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return exported(pieces, tmp_path_factory.mktemp("fast"), add_bos=True)


def by_transformers(fast: Tokenizer, turns: Messages, template: str) -> tuple[list[int], list[int]]:
    """Return ids and loss mask as transformers makes them."""
    own = PreTrainedTokenizerFast(tokenizer_file=str(fast.path), bos_token="<s>", eos_token="</s>")
    options = {"chat_template": template, "return_assistant_tokens_mask": True, "return_dict": True}
    found: Any = own.apply_chat_template(turns, **options)
    return found["input_ids"], found["assistant_masks"]


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def either(request: pytest.FixtureRequest, pieces: Tokenizer, fast: Tokenizer) -> Tokenizer:
    return pieces if request.param == "sentencepiece" else fast


def answers(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decode each run of ids in the mask."""
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    return [tokenizer.decode(run.tolist()) for run in runs[not mask[0] :: 2]]


@pytest.mark.parametrize(("name", "text"), [("internlm", INTERNLM_TEXT), ("chatml", CHATML_TEXT)])
def test_only_answers_are_targets(either: Tokenizer, name: str, text: str) -> None:
    begin, end = MARKERS[TEMPLATES[name]]
    ids, mask = ChatEncoder(TEMPLATES[name], either).encode(TURNS)
    for one, other in zip(ChatEncoder(unmarked(TEMPLATES[name]), either).encode(TURNS), (ids, mask), strict=True):
        assert one.tolist() == other.tolist(), "found turn by turn"
    assert ids.dtype == np.uint32 and mask.dtype == bool and ids.shape == mask.shape
    assert either.decode(ids.tolist()) == text
    assert answers(either, ids, mask) == [f"It is 42.{end}\n", f"Naïve café.\n\n    indented{end}\n"]
    for symbol in (begin, end):
        assert (ids == either.special_ids[symbol]).sum() == text.count(symbol)
    assert not mask[ids == either.special_ids[begin]].any()


@given(TEXT, TEXT, TEXT)
@settings(max_examples=50, deadline=None)
def test_ids_are_those_of_transformers(pieces: Tokenizer, fast: Tokenizer, a: str, b: str, c: str) -> None:
    """ChatML ends what comes before an answer by a line end, which no piece reaches across."""
    turns = [*two(a, b), *two(c, "Yes.")]
    theirs = by_transformers(fast, turns, TEMPLATES["chatml"])
    for tokenizer in (pieces, fast):
        ids, mask = ChatEncoder(TEMPLATES["chatml"], tokenizer).encode(turns)
        assert (ids.tolist(), mask.astype(int).tolist()) == theirs


def test_control_tokens_of_the_template(either: Tokenizer, fast: Tokenizer) -> None:
    turns = two(" Who? \n", "You.") * 2
    ids, mask = ChatEncoder(INST, either).encode(turns)
    assert (ids.tolist(), mask.astype(int).tolist()) == by_transformers(fast, turns, INST)
    assert ids[0] == either.bos_id and ids[-1] == either.eos_id and mask[-1] and (ids == either.eos_id).sum() == 2


@pytest.mark.parametrize("template", [INST, unmarked(INST), TEMPLATES["internlm"]], ids=range(3))
@pytest.mark.parametrize("typed", [" </s></s> \U000f0000", "a</</s>s>"])
def test_typed_control_token_stays_text(either: Tokenizer, template: str, typed: str) -> None:
    encoder = ChatEncoder(template, either)
    plain = two(*(re.sub("[</s>]", "x", text) for text in (typed, "no " + typed)))
    ids, mask = encoder.encode(two(typed, "no " + typed))
    for token in (either.bos_id, either.eos_id):
        assert (ids == token).sum() == (encoder.encode(plain)[0] == token).sum()
    assert typed.strip() in answers(either, ids, mask)[0]
    assert either.decode(ids.tolist()).count(typed.strip()) >= 2


def test_dummy_prefix_is_before_the_first_text_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    blank = remade(tokenizer, tmp_path / "blank.model", SYMBOLS, add_dummy_prefix=True)
    assert blank.encode("It") != tokenizer.encode("It")
    ids, mask = ChatEncoder(TEMPLATES["internlm"], blank).encode(TURNS)
    assert blank.encode(INTERNLM_TEXT) == ids.tolist()
    assert mask.sum() == len(tokenizer.encode("It is 42.Naïve café.\n\n    indented\n\n")) + 2


@pytest.mark.parametrize(
    ("template", "kind", "reason"),
    [
        ("ok\n{% for m in %}", DataError, "data.chat_template: line 2: "),
        (
            "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}\n{% endfor %}",
            DataError,
            "data.chat_template: answers",
        ),
        ("{{ raise_exception('no') }}", ValueError, "the chat template rejects it: no"),
        ("{{ 1 + messages[0]['content'] }}", ValueError, "the chat template rejects it: unsupported operand"),
        ("x{% generation %}{% endgeneration %}", ValueError, "the chat template marks no answer"),
    ],
)
def test_unusable_template(pieces: Tokenizer, template: str, kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=f"^{reason}"):
        ChatEncoder(template, pieces).encode(TURNS)


def test_tokenizer_lacks_template_tokens(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data.chat_template writes <eoh> and <eoa>.*=\['<eoh>', '<eoa>'\]"):
        ChatEncoder(TEMPLATES["internlm"], tokenizer)


@pytest.mark.parametrize("name", ["internlm", "unmarked", "inst", "rich"])
def test_prompt_of_an_answer(either: Tokenizer, name: str) -> None:
    template = {**TEMPLATES, "unmarked": unmarked(TEMPLATES["chatml"]), "inst": INST, "rich": RICH}[name]
    encoder, turns = ChatEncoder(template, either), [turn for turn in TURNS if turn["role"] != "system"]
    turns = [{**turn, "content": turn["content"] + "</s>"} for turn in turns]
    for end in (1, 3):
        ids, mask = encoder.encode(turns[: end + 1])
        begin = len(mask) - int(np.flatnonzero(np.diff(mask[::-1]))[0]) - 1 if mask[-1] else None
        assert encoder.prompt(turns[:end]) == ids[:begin].tolist() and mask[begin:].all()


ENDS = {
    TEMPLATES["internlm"]: "<eoa>",
    unmarked(TEMPLATES["chatml"]): "<|im_end|>",
    INST: "</s>",
    "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}": None,
    "{{ raise_exception('no') }}": None,
}


@pytest.mark.parametrize("template", ENDS)
def test_token_that_ends_an_answer(either: Tokenizer, template: str) -> None:
    end = ENDS[template]
    assert ChatEncoder(template, either).answer_end() == (None if end is None else either.special_ids[end])


def test_answer_without_weight_is_no_target(either: Tokenizer) -> None:
    plain = [*two("q", "bad"), *two("again", "good")]
    turns = [plain[0], {**plain[1], "weight": 0}, *plain[2:]]
    for template in (*TEMPLATES.values(), unmarked(TEMPLATES["chatml"]), RICH):
        ids, mask = ChatEncoder(template, either).encode(turns)
        assert [answer[:4] for answer in answers(either, ids, mask)] == ["good"]
        assert ids.tolist() == ChatEncoder(template, either).encode(plain)[0].tolist()
    twice = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="weight: the chat template marks 4 answers of 2"):
        ChatEncoder(twice, either).encode(turns)


def test_template_that_leaves_out_a_field(pieces: Tokenizer) -> None:
    asked, called = {**TURNS[1], "name": "Ann", "id": 7}, {**TURNS[2], "tool_calls": [CALL]}
    offered = {**asked, "tools": [CALL]}
    result = {"role": "tool", "content": "42"}
    internlm, chatml = (ChatEncoder(TEMPLATES[name], pieces) for name in ("internlm", "chatml"))
    rich, inst = ChatEncoder(RICH, pieces), ChatEncoder(INST, pieces)
    for encoder, turns in ((rich, [offered, called, result, TURNS[2]]), (chatml, [asked, TURNS[2], result, TURNS[2]])):
        encoder.check_written(turns)
    for encoder, turns, reason in (
        (internlm, [asked, TURNS[2], result, TURNS[2]], "the role of tool"),
        (inst, TURNS[:3], "the role of system"),
        (chatml, [offered, TURNS[2]], "tools"),
        (chatml, [asked, called], "tool_calls"),
        (ChatEncoder(RICH.replace("{{ m.content }}\n", "\n"), pieces), TURNS[:3], "the content of system"),
    ):
        with pytest.raises(ValueError, match=f"leaves out {reason}"):
            encoder.check_written(turns)
    typed = [{**asked, "name": "</s>"}, {**called, "tool_calls": [{"a": ["</s>"]}]}]
    ids, _ = rich.encode(typed)
    assert (ids == pieces.eos_id).sum() == 1 and pieces.decode(ids.tolist()).count("</s>") == 2


def test_places_of_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    for folder, template in (("one", "config"), ("two", named), ("three", "no")):
        Path(folder).mkdir()
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    files = {
        "my.jinja": "a file",
        "three/chat_template.jinja": "beside",
        "bad.json": "{",
        "none.json": '{"bos": "<s>"}',
    }
    for name, text in files.items():
        Path(name).write_text(text)
    found = {
        "my.jinja": "a file",
        "one": "config",
        "one/tokenizer_config.json": "config",
        "two": "listed",
        "three": "beside",
    }
    for name, text in {**TEMPLATES, **found}.items():
        assert read_template(name) == text
    with pytest.raises(DataError, match=r"^data\.chat_template \(bad.json\) cannot be read: "):
        read_template("bad.json")
    for name in ("vicuna", "missing.jinja", ".", "none.json"):
        with pytest.raises(DataError, match=r"^data\.chat_template \(.*\) has no template; name one of internlm"):
            read_template(name)
