"""`cakefs plan`: what a pull would fetch, to the byte, before it does."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, with_app, without_gc
from cakefs.cli.out import Out, counted, human_size
from cakefs.cli.sizes import human_time, parse_rate
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.known.preview import Preview, TensorPlan
    from cakefs.model import Manifest
    from cakefs.store.store import Store

HELP = "tell what of a model is here, what other models have of it, and the ranges that a pull would request"
EPILOG = """\
MODEL is a name as `cakefs ls` shows it, or anything that `cakefs add` takes: then headers are read, and no name is
stored. Nothing else is fetched. FROM and TO are bytes of the upstream file, TO not included.

  model.layers 0-7  ██▒░░▓▓█     █ local  ▒ partly  ░ missing  ▓ here, if it is what it is said to be: in the Hub
                                 cache, or under another name by an imported hashes.json
"""
LOCAL, PARTLY, MISSING, CLAIMED = "█▒░▓"
TO_BE_CHECKED = {"claimed", "cached"}
LISTED = 20  # Ranges that are printed without --ranges.


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="name or source of a model")
    add_choice_options(parser)
    parser.add_argument("-t", "--tensors", action="store_true", help="a line for each tensor")
    parser.add_argument("--ranges", action="store_true", help="all ranges, however many")
    parser.add_argument("--rate", metavar="RATE", help="such as 50MB: how fast transfers are, for the time they take")
    add_json_option(parser)


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """What of a model: plan and pull have this in common."""
    parser.add_argument("--files", metavar="GLOB", action="append", default=[], help="only files like this; repeatable")
    parser.add_argument("--layers", metavar="L", help="only these layers, such as 0-15,20: both ends included")
    parser.add_argument("--prefix", metavar="TEXT", default="", help="of the layers' names, where they are unusual")


def run(args: argparse.Namespace, out: Out) -> int:
    rate = parse_rate(args.rate) if args.rate else 0
    found = _preview(args)
    found = found._replace(rate=rate) if rate else found
    if args.json:
        out.json(_as_json(found))
    elif args.tensors or out.quiet:
        _show_tensors([t for t in found.tensors if args.tensors or t.state in ("missing", "partly")], out)
    else:
        _show(found, LISTED if not args.ranges else len(found.requests), out, measured=not rate)
    return 0


def _preview(args: argparse.Namespace) -> "Preview":
    from cakefs.engine.known import survey

    config = config_of(args)
    if (config.store / "format").exists():
        with survey.open_store(config.store) as store:
            if args.model in store.catalog.models.all() or config.offline:
                return _look(store, survey.find_model(store, args.model), args, config.hub_cache)
    from cakefs.engine.models.sources import default_name, parse_source  # the network, 0.2 s: not for a known model

    source = parse_source(args.model, None)

    async def compose(app: "App") -> "Preview":
        import trio

        manifest = await app.compose(source, default_name(source))
        return await trio.to_thread.run_sync(_look, app.store, manifest, args, config.hub_cache)

    return with_app(config, compose)


def _look(store: "Store", manifest: "Manifest", args: argparse.Namespace, cache: Path | None) -> "Preview":
    from cakefs.engine.disk.hubcache import cached_identities
    from cakefs.engine.known.preview import preview

    with without_gc():
        cached = cached_identities(cache, manifest) if cache else ()
        return preview(store, manifest, chosen_spans(store, manifest, args), cached)


def chosen_spans(store: "Store", manifest: "Manifest", args: argparse.Namespace) -> list[int]:
    """The spans that `add_choice_options` names. Raises UserError where there are none."""
    from cakefs.engine.known.preview import layer_spans
    from cakefs.plan.choice import chosen_files, file_spans
    from cakefs.plan.layers import parse_layers

    if args.layers is not None:
        if args.files:
            raise UserError("--layers and --files are two ways to choose", hint="give one of them")
        return layer_spans(store, manifest, parse_layers(args.layers), args.prefix)
    files = chosen_files(manifest, args.files)
    if not files:
        raise UserError(f"no file of {manifest.name} is like {' or '.join(args.files)}")
    return file_spans(manifest, files)


def mark(cell: Mapping[str, int]) -> str:
    """One character for a layer."""
    if cell.keys() <= {"local", "shared"}:
        return LOCAL
    if cell.keys() <= {"local", "shared"} | TO_BE_CHECKED:
        return CLAIMED
    return MISSING if cell.keys() == {"missing"} else PARTLY


def _show(found: "Preview", limit: int, out: Out, *, measured: bool) -> None:
    from cakefs.cli.bars import draw_groups
    from cakefs.plan.diff import group_cells

    for line in draw_groups(group_cells(_cells(found.tensors)), mark):
        out.picture(line, MISSING + PARTLY)
    out.line("")
    count = Counter((str(t.state), bool(t.dtype)) for t in found.tensors)
    words = {
        "local": "here",
        "shared": f"here, and in {_models(found.tensors)}",
        "claimed": "here or coming under another name, if the imported hashes.json is right",
        "cached": "in the Hub cache, and borrowed there if it is what its name says",
        "missing": "to be fetched",
    }
    for state, size in found.bytes.items():
        if size:
            out.line(f"{state:<8} {human_size(size):>8}  {_number(count, state)}: {words[state]}")
    out.line("")
    _show_requests(found, limit, out)
    out.line(_time(found, measured))


def _number(count: "Counter[tuple[str, bool]]", state: str) -> str:
    """How many tensors and other files; what is partly here is also missing."""
    states = [state, "partly"] if state == "missing" else [state]
    tensors, files = (sum(count[s, kind] for s in states) for kind in (True, False))
    words = [counted(tensors, "tensor")] if tensors or not files else []
    return " and ".join([*words, counted(files, "file")] if files else words)


def _show_requests(found: "Preview", limit: int, out: Out) -> None:
    rows = _runs(found)
    out.table(
        ("FILE", ">FROM", ">TO", ">SIZE", ">REQUESTS"),
        [(path, str(start), str(stop), human_size(stop - start), str(n)) for path, start, stop, n in rows[:limit]],
    )
    if len(rows) > limit:
        out.line(f"… and {len(rows) - limit:,} more ranges (--ranges)")


def _runs(found: "Preview") -> list[tuple[str, int, int, int]]:
    """Requests that follow each other, as one range with their number."""
    runs: list[tuple[str, int, int, int]] = []
    for request in found.requests:
        path = found.manifest.sources[request.source].path
        if runs and runs[-1][0] == path and runs[-1][2] == request.start:
            runs[-1] = (path, runs[-1][1], request.stop, runs[-1][3] + 1)
        else:
            runs.append((path, request.start, request.stop, 1))
    return runs


def _time(found: "Preview", measured: bool) -> str:
    from cakefs.engine.known.preview import seconds

    if not found.missing:
        return "a pull fetches nothing"
    what = f"a pull fetches {human_size(found.missing)} by {counted(len(found.requests), 'request')}"
    time = seconds(found.missing, found.rate)
    if time is None:
        return f"{what}; how long that takes is not known: no long transfer was measured yet (--rate 50MB)"
    return f"{what}: {human_time(time)} at {human_size(found.rate)}/s{', as the last time' if measured else ''}"


def _models(tensors: "Sequence[TensorPlan]") -> str:
    names = sorted({name for t in tensors if t.state == "shared" for name in t.same_as.split(", ")})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _cells(tensors: "Sequence[TensorPlan]") -> list[tuple[str, str, int]]:
    return [(t.name, t.state, t.size) for t in tensors if t.dtype]


def _show_tensors(tensors: "Sequence[TensorPlan]", out: Out) -> None:
    out.table(
        ("TENSOR", "DTYPE", "SHAPE", ">SIZE", ">LOCAL", "STATE"),
        [
            (
                t.name,
                t.dtype or "-",
                "x".join(map(str, t.shape)),
                human_size(t.size),
                human_size(t.local_bytes),
                f"{t.state} ({t.same_as})" if t.same_as else t.state,
            )
            for t in tensors
        ],
    )


def _as_json(found: "Preview") -> dict[str, object]:
    import msgspec

    from cakefs.cli.bars import groups_as_json
    from cakefs.engine.known.preview import seconds
    from cakefs.plan.diff import group_cells

    sources = found.manifest.sources
    return {
        "name": found.manifest.name,
        "bytes": {str(state): size for state, size in found.bytes.items()},
        "requests": [
            {"path": sources[r.source].path, "url": sources[r.source].locator.url, "start": r.start, "stop": r.stop}
            for r in found.requests
        ],
        "rate": found.rate or None,
        "seconds": seconds(found.missing, found.rate),
        "layers": groups_as_json(group_cells(_cells(found.tensors)), mark),
        "tensors": [msgspec.structs.asdict(t) for t in found.tensors],
    }
