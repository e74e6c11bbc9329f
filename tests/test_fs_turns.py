"""The turns of the loop, on a pipe in place of the kernel: each request is taken once, and nobody waits for long."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from cakefs.fs.turns import TURN_S, Turns

REQUESTS = 2048


class Queue:
    """Requests of one byte each; to take one that is not there raises BlockingIOError."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()
        os.set_blocking(self.out, False)
        self.turns = Turns()
        self.taken: list[bytes] = []
        self.all_taken = trio.Event()

    def put(self, requests: bytes) -> None:
        os.write(self.into, requests)

    async def take(self) -> None:
        async with self.turns:
            await self.turns.wait_readable(self.out)
        self.taken.append(os.read(self.out, 1))

    async def serve(self) -> None:
        while True:
            await self.take()
            if len(self.taken) % 5 == 0:  # as for a read that waits for the disk
                await trio.lowlevel.checkpoint()
            if len(self.taken) == REQUESTS:
                self.all_taken.set()


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    os.close(queue.out)
    os.close(queue.into)


def test_what_is_there_is_taken_at_once_until_the_turn_is_over(queue: Queue) -> None:
    clock = trio.testing.MockClock()
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            await trio.lowlevel.checkpoint()
            others += 1

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            queue.put(b"abcde")
            await queue.take()
            before = others
            for _ in range(3):
                await queue.take()
            assert others == before, "it waited for its turn"
            clock.jump(2 * TURN_S)
            await queue.take()
            assert others > before
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
    assert queue.taken == [b"a", b"b", b"c", b"d", b"e"]


def test_one_who_waits_is_not_woken_for_what_another_took(queue: Queue) -> None:
    async def main() -> None:
        queue.put(b"a")
        await queue.take()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(queue.take)
            await trio.testing.wait_all_tasks_blocked()
            queue.put(b"b")
            await queue.take()  # taken by this task at once; the other wakes up, as there was something
            queue.put(b"c")

    trio.run(main, clock=trio.testing.MockClock())  # no turn ends, however slow the machine is
    assert queue.taken == [b"a", b"b", b"c"]


def test_many_tasks_take_each_request_once_and_in_order(queue: Queue) -> None:
    requests = bytes(range(256)) * (REQUESTS // 256)

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(7):
                    nursery.start_soon(queue.serve)
                for at in range(0, len(requests), 16):
                    queue.put(requests[at : at + 16])
                    await trio.lowlevel.checkpoint()
                await queue.all_taken.wait()
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert b"".join(queue.taken) == requests
