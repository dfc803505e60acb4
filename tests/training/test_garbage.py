"""When the garbage collector runs."""

import gc
import weakref

from training.garbage import collected_between_steps


class Ring:
    """Something that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_rings_are_freed_when_asked_and_not_in_between() -> None:
    assert gc.isenabled()
    with collected_between_steps() as collect:
        found = [weakref.ref(Ring()) for _ in range(5000)]  # many times what starts a collection
        assert all(ref() is not None for ref in found) and not gc.isenabled()
        collect()
        assert all(ref() is None for ref in found)
    assert gc.isenabled() and gc.get_freeze_count() == 0
