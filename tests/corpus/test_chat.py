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

from corpus.chat import TEMPLATES, ChatEncoder, Messages, read_template
from corpus.config import DataError
from data.hf_tokenizer import write_hf_tokenizer
from data.tokenizer import Tokenizer, load_tokenizer, sentencepiece_proto

SYMBOLS = ["<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>"]
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


def changed(source: Tokenizer, path: Path, symbols: list[str], kind: str = "USER_DEFINED", **rules: bool) -> Tokenizer:
    """Write a SentencePiece model again, with user-defined or control pieces at its end, as InternLM's has them."""
    proto = sentencepiece_proto(source.path)
    for name, value in rules.items():
        setattr(proto.normalizer_spec, name, value)
    for symbol in symbols:
        proto.pieces.add(piece=symbol, score=0.0, type=getattr(proto.SentencePiece, kind))
    path.write_bytes(proto.SerializeToString())
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def pieces(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return changed(tokenizer, tmp_path_factory.mktemp("chat") / "tokenizer.model", SYMBOLS)


@pytest.fixture(scope="module")
def fast(pieces: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("fast")
    write_hf_tokenizer(pieces, folder, add_bos=True, max_len=4096)
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def either(request: pytest.FixtureRequest, pieces: Tokenizer, fast: Tokenizer) -> Tokenizer:
    return pieces if request.param == "sentencepiece" else fast


def answers(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decode each run of ids in the mask."""
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    return [tokenizer.decode(run.tolist()) for run in runs[not mask[0] :: 2]]


@pytest.mark.parametrize(
    ("name", "text", "begin", "end"),
    [("internlm", INTERNLM_TEXT, "<eoh>", "<eoa>"), ("chatml", CHATML_TEXT, "<|im_start|>", "<|im_end|>")],
)
def test_template_masks_all_but_answers(either: Tokenizer, name: str, text: str, begin: str, end: str) -> None:
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
def test_ids_and_mask_are_those_of_transformers(pieces: Tokenizer, fast: Tokenizer, a: str, b: str, c: str) -> None:
    """ChatML ends what comes before an answer by a line end, which no piece reaches across."""
    turns = [{"role": role, "content": text} for role, text in (("user", a), ("assistant", b), ("user", c))]
    turns.append({"role": "assistant", "content": "Yes."})
    own = PreTrainedTokenizerFast(tokenizer_file=str(fast.path), bos_token="<s>", eos_token="</s>")
    theirs: Any = own.apply_chat_template(
        turns, chat_template=TEMPLATES["chatml"], return_assistant_tokens_mask=True, return_dict=True
    )
    for tokenizer in (pieces, fast):
        ids, mask = ChatEncoder(TEMPLATES["chatml"], tokenizer).encode(turns)
        assert ids.tolist() == theirs["input_ids"]
        assert mask.astype(int).tolist() == theirs["assistant_masks"]


def test_control_tokens_of_the_template_are_those_of_transformers(either: Tokenizer, fast: Tokenizer) -> None:
    own = PreTrainedTokenizerFast(tokenizer_file=str(fast.path), bos_token="<s>", eos_token="</s>")
    turns = [{"role": "user", "content": " Who? \n"}, {"role": "assistant", "content": "You."}]
    theirs: Any = own.apply_chat_template(
        turns * 2, chat_template=INST, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = ChatEncoder(INST, either).encode(turns * 2)
    assert ids.tolist() == theirs["input_ids"] and mask.astype(int).tolist() == theirs["assistant_masks"]
    assert ids[0] == either.bos_id and ids[-1] == either.eos_id and mask[-1] and (ids == either.eos_id).sum() == 2


@pytest.mark.parametrize(
    "template", [INST, unmarked(INST), TEMPLATES["internlm"]], ids=["inst", "unmarked", "internlm"]
)
@pytest.mark.parametrize("typed", [" </s></s> \U000f0000", "a</</s>s>"])
def test_typed_control_token_stays_text(either: Tokenizer, template: str, typed: str) -> None:
    encoder = ChatEncoder(template, either)
    turns = [{"role": "user", "content": typed}, {"role": "assistant", "content": "no " + typed}]
    plain = [{**turn, "content": re.sub("[</s>]", "x", turn["content"])} for turn in turns]
    ids, mask = encoder.encode(turns)
    for token in (either.bos_id, either.eos_id):
        assert (ids == token).sum() == (encoder.encode(plain)[0] == token).sum()
    assert typed.strip() in answers(either, ids, mask)[0]
    assert either.decode(ids.tolist()).count(typed.strip()) >= 2


def test_dummy_prefix_is_put_before_the_first_text_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    blank = changed(tokenizer, tmp_path / "blank.model", SYMBOLS, add_dummy_prefix=True)
    assert blank.encode("It") != tokenizer.encode("It")
    ids, mask = ChatEncoder(TEMPLATES["internlm"], blank).encode(TURNS)
    assert blank.encode(INTERNLM_TEXT) == ids.tolist()
    assert mask.sum() == len(tokenizer.encode("It is 42.Naïve café.\n\n    indented\n\n")) + 2


@pytest.mark.parametrize(
    ("template", "kind", "reason"),
    [
        ("ok\n{% for m in %}", DataError, "data.chat_template: line 2: "),
        (
            "{% for m in messages %}{{ loop.revindex }} {{ m['content'] }}\n{% endfor %}",
            DataError,
            "data.chat_template: answers cannot be found",
        ),
        ("{{ raise_exception('no') }}", ValueError, "the chat template rejects it: no"),
        ("{{ 1 + messages[0]['content'] }}", ValueError, "the chat template rejects it: unsupported operand"),
        ("x{% generation %}{% endgeneration %}", ValueError, "the chat template marks no answer"),
    ],
)
def test_template_that_cannot_be_used_has_its_reason(
    pieces: Tokenizer, template: str, kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind, match=f"^{reason}"):
        ChatEncoder(template, pieces).encode(TURNS)


def test_tokenizer_without_the_template_tokens_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data.chat_template writes <eoh> and <eoa>.*=\['<eoh>', '<eoa>'\]"):
        ChatEncoder(TEMPLATES["internlm"], tokenizer)


@pytest.mark.parametrize("name", ["internlm", "unmarked", "inst", "rich"])
def test_prompt_is_what_an_answer_was_trained_after(either: Tokenizer, name: str) -> None:
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
def test_answer_ends_with_the_first_special_token_that_is_learnt_after_it(either: Tokenizer, template: str) -> None:
    end = ENDS[template]
    assert ChatEncoder(template, either).answer_end() == (None if end is None else either.special_ids[end])


def test_answer_of_no_weight_is_not_learnt(either: Tokenizer) -> None:
    turns = [*two("q", "bad"), *two("again", "good")]
    turns[1]["weight"] = 0
    for template in (*TEMPLATES.values(), unmarked(TEMPLATES["chatml"]), RICH):
        ids, mask = ChatEncoder(template, either).encode(turns)
        assert [answer[:4] for answer in answers(either, ids, mask)] == ["good"]
        assert (
            ids.tolist() == ChatEncoder(template, either).encode([*two("q", "bad"), *two("again", "good")])[0].tolist()
        )
    twice = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="weight: the chat template marks 4 answers of 2"):
        ChatEncoder(twice, either).encode(turns)


def test_what_matters_of_messages_is_written_or_refused(pieces: Tokenizer) -> None:
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


def test_template_is_read_by_name_or_from_a_model(tmp_path: Path) -> None:
    assert read_template("chatml") == TEMPLATES["chatml"]
    (tmp_path / "my.jinja").write_text("{{ 'jinja' }}")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    for folder, template in (("one", "config"), ("two", named)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert read_template(str(tmp_path / "my.jinja")) == "{{ 'jinja' }}"
    assert read_template(str(tmp_path / "one")) == "config"
    assert read_template(str(tmp_path / "one" / "tokenizer_config.json")) == "config"
    assert read_template(str(tmp_path / "two")) == "listed"
    (tmp_path / "one" / "chat_template.jinja").write_text("beside")
    assert read_template(str(tmp_path / "one")) == "beside"
    (tmp_path / "damaged.json").write_text('{"chat_template": ')
    with pytest.raises(DataError, match=r"^data\.chat_template \(.*damaged.json\) cannot be read: "):
        read_template(str(tmp_path / "damaged.json"))
    (tmp_path / "none.json").write_text('{"bos_token": "<s>"}')
    for name in ("vicuna", str(tmp_path / "missing.jinja"), str(tmp_path), str(tmp_path / "none.json")):
        with pytest.raises(
            DataError, match=r"^data\.chat_template \(.*\) has no template; name one of internlm, chatml"
        ):
            read_template(name)
