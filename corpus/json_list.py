"""A list of JSON records of any length, of which only a few are in memory at a time."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from corpus.compression import DamageError
from corpus.documents import not_json
from corpus.long import UnreadableError

LONGEST_ESCAPE = 16  # characters, of two that make one
PARSER = json.JSONDecoder()


class Window:
    """The part of a text that is being read, of which `texts` are the pieces."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts = texts
        self.text, self.at = "", 0
        self.over = False
        self.failure: Exception | None = None  # because of which it is over before its end

    def more(self) -> None:
        """Read on, to twice as much of what is not complete."""
        parts = [self.text[self.at :]]
        size, wanted = len(parts[0]), 2 * len(parts[0])
        try:
            while not parts[1:] or size < wanted:
                parts.append(next(self.texts))
                size += len(parts[-1])
        except StopIteration:
            self.over = True
        except (UnreadableError, DamageError) as error:
            self.over, self.failure = True, error
        self.text, self.at = "".join(parts), 0

    def record_at(self) -> int:
        """Give the place after a comma."""
        at = self._skip_space(self.at)
        return self._skip_space(at + 1) if self.text[at : at + 1] == "," else at

    def _skip_space(self, at: int) -> int:
        while self.text[at : at + 1].isspace():
            at += 1
        return at

    def ends(self) -> bool:
        """Say whether there is no further record in the list."""
        while self.record_at() == len(self.text) and not self.over:
            self.more()
        return self.text[self.record_at() :][:1] == "]"

    def goes_on(self) -> bool:
        """Say whether anything but blanks follows the end of the list; raises what ended the text before its end."""
        if self.failure is not None:
            raise self.failure
        rest = chain([self.text[self.record_at() + 1 :]], self.texts)
        return any(text and not text.isspace() for text in rest)

    def record(self, most: int) -> tuple[Any, int] | None:
        """Give the next record and its length, or None if that is over `most`.

        Raises `UnreadableError`, or what ended the text before its end.
        """
        while True:
            start = self.record_at()
            try:
                if "," not in self.text[self.at : start]:
                    raise json.JSONDecodeError("a comma is missing", self.text, start)
                record, end = PARSER.raw_decode(self.text, start)
                if self.over or len(self.text) - end > 2:  # a number may go on: 1 by e+2
                    self.at = end
                    return record, end - start
            except (ValueError, RecursionError) as error:
                if self.over or _is_certain(error, len(self.text)):
                    raise self.failure or UnreadableError(not_json(error, lambda at, start=start: at - start)) from None
            if len(self.text) - start > most:
                return None
            self.more()


def _is_certain(error: Exception, n_chars: int) -> bool:
    """Say whether json would find the same error if more of the text were there."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return error.pos < n_chars - LONGEST_ESCAPE and not error.msg.startswith("Unterminated")
