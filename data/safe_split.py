"""Where a text may be cut so that its parts, encoded apart, have the ids of the whole.

The place is before a space that no blank precedes. That no token lies across it is read off the tokenizer: either
what splits a text into words always splits it there, or no piece of the vocabulary holds such a space within.
Where neither can be read, a text is encoded whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SPACE = "\u2581"  # how SentencePiece, and Hugging Face's Metaspace, write a space
INSIDE = re.compile(r"[^\s\u2581][ \u2581]")
SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# The alternatives of GPT-2's, GPT-4's, Llama 3's, Qwen's and GPT-4o's patterns. None takes a space after anything but
# a blank, and what they look ahead for is the same before a space as at the end of a text.
ALTERNATIVES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", SUFFIXES, "'(?i:[sdmt]|ll|ve|re)"),
    *(r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"[^\r\n\p{L}\p{N}]?\p{L}+"),
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIXES}?", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIXES}?"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s*[\r\n]", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
}


def last_space(text: str) -> int:
    """Give the last place before a space that no blank precedes; 0 if there is none."""
    end = text.rfind(" ", 1)
    while end > 0 and (text[end - 1].isspace() or text[end - 1] == SPACE):
        end = text.rfind(" ", 1, end)
    return max(end, 0)


def cut(text: str, limit: int, last_cut: Callable[[str], int]) -> Iterator[str]:
    """Yield a text in parts of at most `limit` characters, and of more where `last_cut` finds no place."""
    start, size = 0, limit
    while len(text) - start > size:
        if end := last_cut(text[start : start + size + 1]):
            yield text[start : start + end]
            start, size = start + end, limit
        else:
            size *= 2
    if start < len(text):
        yield text[start:]


def none_inside(pieces: Iterable[str]) -> bool:
    """Say whether no piece holds a space after anything but a blank, so that no merge leads across one."""
    return not any(INSIDE.search(piece) for piece in pieces)


def cuts_at_spaces(stored: dict[str, Any]) -> bool:
    """Say whether a tokenizer.json allows cuts before spaces that no blank precedes."""
    return (
        all(map(_stays_on_its_side, stored.get("added_tokens") or []))
        and all(map(_normalizes_apart, _steps(stored.get("normalizer"), "normalizers")))
        and (_splits_at_spaces(stored) or _merges_within(stored))
    )


def _steps(stored: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if stored is None:
        return []
    return [step for each in stored[key] for step in _steps(each, key)] if stored["type"] == "Sequence" else [stored]


def _stays_on_its_side(token: dict[str, Any]) -> bool:
    content = token["content"].replace(SPACE, " ")
    blank = content.isspace() and len(content) > 1  # such a one is found from the first of several blanks on
    return not token["rstrip"] and (" " not in content or (blank and not token["single_word"]))


def _normalizes_apart(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == SPACE
    return step["type"] in ("NFC", "Prepend")


def _splits_at_spaces(stored: dict[str, Any]) -> bool:
    """Say whether every text is split before a space, whatever surrounds it; a `Prepend` would change the parts."""
    if any(step["type"] == "Prepend" for step in _steps(stored.get("normalizer"), "normalizers")):
        return False
    replaced = any(step["type"] == "Replace" for step in _steps(stored.get("normalizer"), "normalizers"))
    found = [_splits(step, replaced) for step in _steps(stored.get("pre_tokenizer"), "pretokenizers")]
    return None not in found and True in found


def _splits(step: dict[str, Any], replaced: bool) -> bool | None:
    """Say whether a step splits a text there; None if it may do otherwise with parts than with the whole."""
    match step:
        case {"type": "Metaspace", "replacement": replacement} if step.get("split", True):
            return True if replacement == SPACE else None
        case {"type": "ByteLevel"}:
            return step.get("use_regex", True) and not replaced
        case {"type": "Digits"}:
            return False
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            alternatives = set(_alternatives(pattern))
            return r"\s+" in alternatives and not replaced if alternatives <= ALTERNATIVES else None
    return None


def _alternatives(pattern: str) -> Iterator[str]:
    """Yield what stands between the `|` that are in no group."""
    begins = depth = 0
    for sign in re.finditer(r"\\.|[()|]", pattern):
        depth += {"(": 1, ")": -1}.get(sign[0], 0)
        if sign[0] == "|" and not depth:
            yield pattern[begins : sign.start()]
            begins = sign.end()
    yield pattern[begins:]


def _merges_within(stored: dict[str, Any]) -> bool:
    """Say whether a text is one word, of whose characters none merge across a space."""
    model, whole = stored["model"], stored.get("pre_tokenizer")
    one_word = whole is None or (whole["type"] == "Metaspace" and whole.get("split") is False)
    plain = not any(
        model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if not (one_word and plain and model.get("type") == "BPE" and model.get("byte_fallback")):
        return False
    bytes_merge = any("<0x" in piece and len(piece) > len("<0x00>") for piece in model["vocab"])
    return SPACE in model["vocab"] and none_inside(model["vocab"]) and not bytes_merge
