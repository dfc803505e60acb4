"""Records of conversations, in the styles that datasets have them, become messages."""

from typing import Any

import pytest

from corpus.chat import messages_of
from tests.corpus.test_chat import CALL, TURNS, two


def test_records_of_each_style_become_messages() -> None:
    assert messages_of({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", "messages") == two(
        "Add.\n1 2", "3"
    )
    for blank in ({}, {"input": ""}, {"input": None}):
        assert messages_of({"instruction": "Go.", "output": "Yes", **blank}, "alpaca", "messages") == two("Go.", "Yes")
    assert messages_of({"messages": TURNS, "id": 1}, "chat", "messages") == TURNS
    assert messages_of({"a": {"b": [{**TURNS[1], "loss": None}, TURNS[2]]}}, "chat", "a.b") == TURNS[1:3]
    nulls = [{**turn, "from": None, "value": None} for turn in TURNS]  # as a table's columns have them
    assert messages_of({"messages": nulls}, "chat", "messages") == TURNS
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert messages_of({"conversations": shared}, "chat", "conversations") == [
        {"role": "system", "content": "s"}, *two("q", "a"),
    ]  # fmt: skip
    system = {"role": "system", "content": "Be brief."}
    alpaca = {"instruction": "Go.", "output": "Yes", "history": [], "system": "Be brief."}
    assert messages_of(alpaca, "alpaca", "") == [system, *two("Go.", "Yes")]
    offered = {"system": "Be brief.", "tools": '[{"name": "f"}]', "conversations": shared[1:]}
    assert messages_of(offered, "chat", "conversations") == [{**system, "tools": [{"name": "f"}]}, *two("q", "a")]
    assert messages_of({"tools": "[]", "messages": two("q", "a")}, "chat", "messages") == two("q", "a")
    called = [two("q", "a")[0], {"role": "assistant", "content": None, "tool_calls": [CALL], "name": "bot"}]
    assert messages_of({"messages": called}, "chat", "messages") == [called[0], {**called[1], "content": ""}]


@pytest.mark.parametrize(
    ("record", "style", "reason"),
    [
        ({"texts": []}, "chat", "data.messages_key (messages)"),
        ({"messages": []}, "chat", "data.messages_key (messages) is empty"),
        ({"messages": ["hello"]}, "chat", "role must be a string"),
        ({"messages": [{"role": "user", "content": None}]}, "chat", "content must be a string"),
        ({"messages": [{"from": "gpt", "content": "a"}]}, "chat", "value must be a string"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "chat", "unknown role 'judge'"),
        ({"messages": [{**TURNS[2], "weight": 0.5}]}, "chat", "weight (0.5) must be 0 or 1"),
        ({"messages": [TURNS[1], {**TURNS[2], "weight": 0}]}, "chat", "no message of the assistant"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "alpaca", "history has messages"),
        ({"messages": two("a", "b"), "tools": "[{"}, "chat", ""),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "chat", "content has a lone surrogate"),
        ({"messages": two("a", " \n")}, "chat", "no message of the assistant"),
        ({"instruction": "a"}, "alpaca", "output must be a string"),
        ("text", "alpaca", "instruction must be a string"),
    ],
)
def test_bad_conversation_has_its_reason(record: Any, style: Any, reason: str) -> None:
    with pytest.raises(ValueError) as raised:
        messages_of(record, style, "messages")
    assert str(raised.value).startswith(reason)
