"""The network as a transfer process uses it: connections that are kept, and closed when they are of no more use."""

import trio

from cakefs.engine.transfer.messages import SPARE_CONNECTIONS, Settings
from cakefs.errors import UserError
from cakefs.model import ByteRange, Locator
from cakefs.remotes.base import Remote, Sink
from cakefs.remotes.files import Files
from cakefs.remotes.http import CONNECT_S, IDLE_S, HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry

CLOSE_S = 2.0


class Network:
    """The connections for the tokens that hold now, and those that transfers under way began with."""

    def __init__(self) -> None:
        self._connections: Connections | None = None

    async def remote(self, settings: Settings) -> Remote:
        """With these tokens; transfers under way keep those they began with."""
        budget_s = settings.read_timeout_s
        # So short that a second try fits in, and that the log tells what was waited for.
        connect_s, idle_s = min(CONNECT_S, budget_s / 3), min(IDLE_S, budget_s / 2)
        before = self._connections
        try:
            http = HttpRemote(tokens=settings.tokens, connect_s=connect_s, idle_s=idle_s)
        except UserError as error:
            return Files(Unusable(error))
        at_once = settings.connections + SPARE_CONNECTIONS
        self._connections = Connections(http, Retry(Limit(Log(http), at_once), budget_s=budget_s))
        if before is not None:
            await before.retire()
        return Files(self._connections)

    async def aclose(self) -> None:
        if self._connections is not None:
            await self._connections.aclose()


class Unusable:
    """Instead of a network that is set up wrongly: who wants something of it is told why."""

    def __init__(self, error: UserError) -> None:
        self._error = error

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        raise UserError(self._error.message, hint=self._error.hint)


class Connections:
    """What a remote holds open: closed when it is asked to retire, or once the last fetch has ended that uses it."""

    def __init__(self, http: HttpRemote, remote: Remote) -> None:
        self._http = http
        self._remote = remote
        self._users = 0
        self._retired = False

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        self._users += 1
        try:
            await self._remote.fetch(locator, span, sink)
        finally:
            self._users -= 1
            await self._close_unused()

    async def retire(self) -> None:
        self._retired = True
        await self._close_unused()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            await self._http.aclose()

    async def _close_unused(self) -> None:
        if self._retired and not self._users:
            await self.aclose()
