"""What the tests of HttpRemote share: a repository on the test hub, and short ways to fetch from it."""

import random
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from cakefs.model import MIB, ByteRange, Locator
from cakefs.remotes.base import read
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from tests.hub import Hub

DATA = random.Random(7).randbytes(3 * MIB + 12345)
SMALL = b'{"model_type": "llama"}'
SPAN = ByteRange(MIB + 5, 2 * MIB + 77)
TOKEN = "hf_SecretSecretSecret"
REPO = "org/name"
BIG = "model.safetensors"


def fill(hub: Hub) -> None:
    hub.add_repo(REPO, {BIG: DATA, "config.json": SMALL, "a b/ü%.bin": b"x" * 100})
    hub.add_repo("org/gated", {BIG: DATA[:1000]}, gated=True, token=TOKEN)
    hub.add_repo("org/private", {BIG: DATA[:1000]}, private=True, token=TOKEN)


def locator(hub: Hub, path: str = BIG, size: int = len(DATA), repo: str = REPO) -> Locator:
    return Locator(f"{hub.endpoint}/{repo}/resolve/main/{path}", size)


class Collected:
    """A sink that remembers the pieces it got."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def __call__(self, data: bytes) -> None:
        self.pieces.append(data)

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


def remote(**settings: Any) -> HttpRemote:
    """Without the certificates of the system, whose loading is what takes longest here."""
    return HttpRemote(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **settings)


def retrying(http: HttpRemote, budget_s: float = 20.0) -> Retry:
    """As the transfer processes stack them, but without waiting between tries."""
    return Retry(Limit(Log(http), 4), budget_s, jitter=lambda low, high: 0.0)


def fetched(where: Locator, span: ByteRange = SPAN, retry: bool = False, **settings: Any) -> bytes:
    async def main() -> bytes:
        async with remote(**settings) as http:
            return await read(retrying(http) if retry else http, where, span)

    return trio.run(main)


def with_remote(test: Callable[[HttpRemote], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with remote(**settings) as http:
            await test(http)

    trio.run(main)


def ranges(hub: Hub, stage: str) -> list[str]:
    return [r.range for r in hub.requests if r.stage == stage]
