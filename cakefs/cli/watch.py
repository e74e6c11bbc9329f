"""`cakefs status --watch`: the same picture every second, painted over itself. Calm: nothing moves but what changes."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cakefs.cli.figures import lines_of, store_status
from cakefs.cli.out import Out, human_size, printable
from cakefs.errors import UserError

WATCH_S = 1.0
REST_FACTOR = 10  # Counting the models may take a tenth of the time.
RECENT_S = 30.0  # A model that grew is shown first for so long.
BAR = 20


class Recount:
    """The store, counted anew as often as that is cheap; `grown` says when each model was last seen to grow."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._due = 0.0
        self._status: dict[str, Any] = {}
        self.grown: dict[str, float] = {}

    def __call__(self) -> dict[str, Any]:
        from cakefs.engine.serve.sizes import count

        started = time.monotonic()
        if started >= self._due:
            before = self._status.get("per_model", {})
            self._status = store_status(self._store, count(self._store))
            self._due = time.monotonic() + REST_FACTOR * (time.monotonic() - started)
            for name, model in self._status["per_model"].items():
                if name in before and model["local_bytes"] > before[name]["local_bytes"]:
                    self.grown[name] = started
        return self._status


def watch(look: Callable[[dict[str, Any]], dict[str, Any]], store: Path, out: Out, *, as_json: bool) -> None:
    """Ends with Ctrl-C, which is the way to end it and no failure.

    Args:
        look: Makes the whole status of that of the store.
    """
    recount = Recount(store)
    try:
        if as_json:
            while True:
                out.json_line(look(recount()))
                time.sleep(WATCH_S)
        _paint(lambda: frame(look(recount()), recount.grown, time.monotonic(), *shutil.get_terminal_size()))
    except KeyboardInterrupt:
        return


def _paint(picture: Callable[[], list[str]]) -> None:
    if sys.stdout is None or not sys.stdout.isatty():
        raise UserError("--watch needs a terminal", hint="cakefs status --watch --json")
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(picture()), no_wrap=True, overflow="crop"), refresh=True)
            time.sleep(WATCH_S)


def frame(status: dict[str, Any], grown: Mapping[str, float], now: float, width: int, height: int) -> list[str]:
    """What fits on a terminal: the lines of `cakefs status`, then models, those that grow first."""
    lines = lines_of(status)
    room = max(0, height - len(lines) - 3)
    models = status["store"]["per_model"]
    shown = list(islice(_order(models, grown, now), room))
    names = max((min(len(name), width // 2) for name in shown), default=0)
    lines += [""] * bool(shown) + [_model_line(name, models[name], names) for name in shown]
    if shown and len(shown) < len(models):
        lines.append(f"and {len(models) - len(shown)} more")
    return [printable(line)[: width - 1] for line in lines[: height - 1]]


def _order(models: Mapping[str, Any], grown: Mapping[str, float], now: float) -> Iterator[str]:
    """Those that grow; those that are not complete but begun; the others."""
    growing = {name for name, when in grown.items() if now - when < RECENT_S and name in models}
    begun = {name for name, m in models.items() if 0 < m["local_bytes"] < m["size"]} - growing
    for group in (growing, begun, models.keys() - growing - begun):
        yield from sorted(group)


def _model_line(name: str, model: Mapping[str, Any], names: int) -> str:
    done = BAR * model["local_bytes"] // max(1, model["size"])
    bar = "━" * done + "·" * (BAR - done)
    short = name if len(name) <= names else name[: names - 1] + "…"
    local, size = human_size(model["local_bytes"]), human_size(model["size"])
    return f"{short:<{names}}  {bar}  {local:>7} of {size:>7}  {model['state']}"
