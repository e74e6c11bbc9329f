"""The end that was asked for: those who are reading may finish, those who only hold a file are not waited for.

The mount stays where it is meanwhile, so that a program in the middle of loading a model finds the rest of it.
"""

import logging
from collections.abc import Callable

import trio

from cakefs.errors import CakeError
from cakefs.fs.place import unmount_unused

log = logging.getLogger(__name__)

QUIET_S = 3.0  # Nothing asked for this long: what is still open is held, not read. A loaded model is, for days.
LOOK_S = 0.25


async def wait_for_readers(
    path: str, device: str, activity: Callable[[], object], waiting: Callable[[], int], grace_s: float
) -> None:
    """Unmounts as soon as nothing is in use; returns also when nobody reads any more, or after the grace.

    Args:
        device: Of our own mount: another one at the place is left alone.
        activity: Changes with every request.
        waiting: Reads that wait for the network: they are not quiet.
    """
    last, since = activity(), trio.current_time()
    deadline = since + grace_s
    while True:
        if await trio.to_thread.run_sync(_unmounted, path, device):
            return
        now = trio.current_time()
        if (seen := activity()) != last or waiting():
            last, since = seen, now
        if now - since >= QUIET_S or now >= deadline:
            return
        await trio.sleep(LOOK_S)


def _unmounted(path: str, device: str) -> bool:
    try:
        return unmount_unused(path, device)
    except CakeError as error:
        log.warning("%s", error)
        return True
