"""Difficult text for checking that two tokenizers agree."""

import argparse
import json.decoder
import pydoc_data.topics
import typing
from itertools import product
from pathlib import Path

SCRIPTS = (
    "The quick brown fox", "今天天气晴朗，适合出门散步。", "日本語のテキスト", "안녕하세요 세계",
    "Привет, мир!", "مرحبا بالعالم",
    "नमस्ते दुनिया", "Γειά σου Κόσμε", "naïve café über straße", "e\u0301 combined", "👩‍👩‍👧 family 😀", "𝕏 𝒜 ∑ ∫ √",
    "1234567890 3.14159 -2e-7 0xDEADBEEF", "x=y;z+=1//2**3", "<div class='a'>&amp;</div>",
    "C:\\path\\to\\file", "\u00a0\u2003wide", "a\0zero",
)  # fmt: skip
FRAMES = (
    "{}", " {}", "   {}", "\t{}", "{}\n", "{}  \n\n", "\n\n{}", "{} {}", "{}\r\n", "    {}:\n        {}", "({})",
    "{}," * 3,
)  # fmt: skip


def mixed_lines() -> list[str]:
    """Return over 1,000 lines: code, prose, scripts, emoji, numbers, and all kinds of whitespace."""
    lines = [frame.replace("{}", text) for frame, text in product(FRAMES, SCRIPTS)]
    lines += [" " * n for n in range(1, 20)] + ["\n" * n for n in range(1, 6)] + ["\t" * n for n in range(1, 6)]
    lines += pydoc_data.topics.topics["strings"].split("\n")
    for module in (argparse, json.decoder, typing):
        lines += Path(str(module.__file__)).read_text(encoding="utf-8").splitlines(keepends=True)[:400]
    return [line for line in dict.fromkeys(lines) if line]
