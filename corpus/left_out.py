"""Records left out of a corpus: bad records, documents without text, exact duplicates."""

from dataclasses import dataclass, field
from typing import Any

from corpus.config import DataError, OnBadRecord

MOST_PLACES = 10


@dataclass(slots=True)
class LeftOut:
    """Counts of records left out, and the places of the first bad ones."""

    policy: OnBadRecord
    count: int = 0  # bad records
    empty: int = 0
    duplicates: int = 0
    places: list[str] = field(default_factory=list)

    def bad(self, place: str, reason: str) -> None:
        """Count a bad record; raise `DataError` if the policy is `error`."""
        if self.policy is OnBadRecord.error:
            raise DataError(f"{place}: {reason}; fix it, or leave such records out with data.on_bad_record=skip")
        self.merge({"count": 1, "empty": 0, "duplicates": 0, "places": [f"{place}: {reason}"]})

    def merge(self, other: dict[str, Any]) -> None:
        """Add the `as_json()` of another instance."""
        self.count += other["count"]
        self.empty += other["empty"]
        self.duplicates += other["duplicates"]
        self.places = [*self.places, *other["places"]][:MOST_PLACES]

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "empty": self.empty, "duplicates": self.duplicates, "places": self.places}

    def first(self) -> str:
        """Return the number of bad records and the first, to append to a message."""
        return f": {self.count} bad records, the first {self.places[0]}" if self.count else ""
