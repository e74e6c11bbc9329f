"""How much of each model is local and what sharing saves, for the counters of a mount: counted by a child process.

To count means to walk over all models and spans of the store, which the serving process must not do. It happens only
while somebody looks at the counters, rests for many times as long as it took, and what is shown meanwhile is the last
that was counted. As a script this module is that child.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import trio

from cakefs.engine.known.survey import summarize_models, summarize_store
from cakefs.errors import CakeError
from cakefs.execute import child_environment, python_command

log = logging.getLogger(__name__)

REST_S = 5.0  # At least, between two counts;
REST_FACTOR = 20  # and this many times what the last one took.
LIMIT_S = 300.0


class ModelSize(NamedTuple):
    size: int
    local_bytes: int
    state: str


class Sizes(NamedTuple):
    """Attributes:
    stored_bytes: What the store takes: blobs, and what is unfinished.
    saved_bytes: What plain copies of all that is local of each model would take beyond that.
    as_of: Unix seconds.
    """

    models: dict[str, ModelSize]
    stored_bytes: int
    saved_bytes: int
    as_of: int


def count(store: Path) -> Sizes:
    """Counts now. Raises CakeError."""
    models = {m.name: ModelSize(m.size, m.local_bytes, m.state) for m in summarize_models(store)}
    usage = summarize_store(store)
    stored = usage.blob_bytes + usage.partial_bytes
    saved = sum(model.local_bytes for model in models.values()) - stored
    return Sizes(models, stored, max(0, saved), int(time.time()))


class Counting:
    """The last count, and the task that has it made anew while somebody looks."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._latest: Sizes | None = None
        self._wanted = trio.Event()

    def latest(self) -> Sizes | None:
        """None before the first time."""
        self._wanted.set()
        return self._latest

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            started = trio.current_time()
            await self._count()
            await trio.sleep(max(REST_S, REST_FACTOR * (trio.current_time() - started)))

    async def _count(self) -> None:
        command = python_command("cakefs.engine.serve.sizes", str(self._store))
        try:
            with trio.fail_after(LIMIT_S):
                done = await trio.run_process(
                    command, capture_stdout=True, capture_stderr=True, check=False, env=child_environment()
                )
        except (OSError, trio.TooSlowError) as error:
            log.warning("cannot count what is local: %s", error)
            return
        if done.returncode:
            log.warning("cannot count what is local: %s", done.stderr.decode(errors="replace").strip())
            return
        self._latest = _parsed(done.stdout)


def _parsed(text: bytes) -> Sizes:
    models, *rest = json.loads(text)
    return Sizes({name: ModelSize(*size) for name, size in models.items()}, *rest)


def main() -> int:
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    try:
        json.dump(count(Path(sys.argv[1])), sys.stdout, separators=(",", ":"))
    except CakeError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
