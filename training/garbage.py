"""Python's garbage collector, kept out of the steps: it stops the host for longer than a small step takes."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_between_steps() -> Iterator[Callable[[], object]]:
    """Keep the collector from running by itself; gives the call that runs it, over what was made since the last one."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # the model and the modules stay: they are not looked at again
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
