"""`cakefs import`: show what is on this machine already, without a copy and without a transfer."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.disk.found import Skipped
    from cakefs.engine.disk.importing import Imported
    from cakefs.engine.index import Added

HELP = "show what is on this machine already: the Hub cache, Ollama's models, a directory"
EPILOG = """\
WHAT is one of
  hub-cache      every model in the cache of huggingface_hub ($HF_HUB_CACHE)
  ollama         every model of Ollama ($OLLAMA_MODELS)
  PATH           a directory or a file

Everything is read once, to know what it is. The bytes stay where they are: nothing is copied but headers and small
files. When such a file changes or goes, what was borrowed of it is fetched again from where the model comes from.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("what", metavar="WHAT", help="hub-cache, ollama or a path, see below")
    parser.add_argument("--as", dest="name", metavar="NAME", help="show a PATH under this name")
    parser.add_argument("--copy", action="store_true", help="copy the bytes into the store")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    done = import_what(args, args.what, args.name, out, copy=args.copy)
    if args.json:
        out.json(_as_json(done))
        return 0
    for added in done.models:
        name = added.manifest.name
        text = f"{'imported' if added.changed else 'unchanged'} {name}: {human_size(added.total)}"
        missing = added.total - added.local
        out.result(name, text + (f", {human_size(missing)} of it not here" if missing else ""))
    say_skipped(done.skipped, out)
    if not out.quiet:
        models, borrowed = counted(len(done.models), "model"), human_size(done.borrowed_bytes)
        out.line(f"{models}: {borrowed} borrowed in place, {human_size(done.stored_bytes)} copied into the store")
    return 0


def import_what(
    args: argparse.Namespace, what: str, name: str | None, out: Out, *, copy: bool = False, update: bool = False
) -> "Imported":
    """Finds models and shows them."""
    from pathlib import Path

    import trio

    from cakefs.engine.disk import folder, importing
    from cakefs.engine.disk.meter import Meter
    from cakefs.engine.known.naming import model_name

    importing.check_name(what, name)
    config = config_of(args)
    many = what in (importing.HUB_CACHE, importing.OLLAMA)
    if not many:
        name = model_name(folder.name_of(Path(os.path.expanduser(what))) if name is None else name)

    async def body(app: "App") -> "Imported":
        found, skipped = await trio.to_thread.run_sync(importing.find, what, name, config, os.environ)
        with late_bar(out, "reading") as show:
            meter = Meter(show)
            return await importing.import_found(
                app.store, found, skipped, meter, copy=copy, update=update, one=not many, limit=app.fetcher.limit
            )

    return with_app(config, body)


@contextmanager
def late_bar(out: Out, label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that begins with the first byte, when the total is known."""
    with ExitStack() as stack:
        bars: list[Callable[[int], None]] = []

        def show(done: int, expected: int) -> None:
            if not bars:
                bars.append(stack.enter_context(out.progress(label, expected)))
            bars[0](done)

        yield show


def say_skipped(skipped: "list[Skipped]", out: Out) -> None:
    for one in skipped:
        out.note(f"skipped {one.what}: {one.why}")


def added_as_json(added: "Added") -> dict[str, object]:
    """What `add` and `import` say of a model."""
    return {
        "name": added.manifest.name,
        "origin": added.manifest.origin,
        "revision": added.manifest.revision,
        "changed": added.changed,
        "size": added.total,
        "local_bytes": added.local,
    }


def _as_json(done: "Imported") -> dict[str, object]:
    return {
        "models": [added_as_json(added) for added in done.models],
        "skipped": [one._asdict() for one in done.skipped],
        "borrowed_bytes": done.borrowed_bytes,
        "stored_bytes": done.stored_bytes,
    }
