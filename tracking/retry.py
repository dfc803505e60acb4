"""Retries after transient errors of disks and networks."""

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

# ENOENT: a file that another node has just written may not be visible yet. EACCES, EPERM: a network disk says so while
# its server, or a ticket, is renewed.
PASSING = {errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOENT}
PASSING |= {errno.EACCES, errno.EPERM}
WAITS_S = (0.1, 0.4, 1.5, 4.0)

logger = logging.getLogger(__name__)


def of_a_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in PASSING


def retried(step: Callable[[], Any], passes: Callable[[Exception], bool] = of_a_disk) -> Any:
    """Run `step`, and retry it with growing waits after errors for which `passes` is true."""
    for wait_s in WAITS_S:
        try:
            return step()
        except Exception as error:
            if not passes(error):
                raise
            logger.warning("%s; trying again in %g s", error, wait_s)
            time.sleep(wait_s)
    return step()
