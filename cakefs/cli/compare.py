"""`cakefs compare`: how near the tensors of two models are that are not equal."""

import argparse
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Counted, Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.plan.pairs import Pair, Pairs
    from cakefs.plan.similarity import Similarity

HELP = "tell how near the unequal tensors of two models are"
EPILOG = """\
Tensors that are known to be equal are not read; of the others both sides are, and fetched where they are missing.

  equal      part of the bytes that are the same
  flipped    part of the bits that are not
  cosine     of the two as vectors; near 1 for any two fine-tunes, so alone it says little
  max |a-b|  the largest difference of two elements

Elements that are NaN or infinite on a side take no part in the last two; how many there are is told.
"""
TITLES = ("TENSOR", "DTYPE", ">SIZE", ">EQUAL", ">FLIPPED", ">COSINE", ">MAX |A-B|")


class Compared(NamedTuple):
    """The tensors of two models, and what was found of those that were read."""

    pairs: "Pairs"
    read: "list[tuple[Pair, Similarity]]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("a", metavar="A", help="a model, as `cakefs ls` shows it")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument(
        "--tensor", metavar="NAME", action="append", default=[], help="only this one, or those like this; repeatable"
    )
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    async def compare(app: "App") -> Compared:
        return await _compare(app, args, out)

    done = with_app(config_of(args), compare)
    if args.json:
        out.json(_as_json(args.a, args.b, done))
        return 0
    unequal = [(pair, found) for pair, found in done.read if not found.equal]
    out.table(TITLES, [_row(pair, found) for pair, found in unequal])
    if out.quiet:
        return 0
    for pair in done.pairs.unlike:
        out.line(f"{pair.name}: {_kind(pair.a)} in {args.a}, {_kind(pair.b)} in {args.b}")
    for pair, found in unequal:
        if found.left_out:
            said = f"{counted(found.left_out, 'element')} NaN or infinite, {found.clashes:,} of them not the same"
            out.line(f"{pair.name}: {said}")
    for name, only in ((args.a, done.pairs.only_a), (args.b, done.pairs.only_b)):
        if only:
            out.line(f"only in {name}: {', '.join(only[:5])}{f' and {len(only) - 5:,} more' if len(only) > 5 else ''}")
    equal = len(done.pairs.equal) + len(done.read) - len(unequal)
    read = human_size(done.pairs.size)
    out.line(f"{counted(equal, 'tensor')} equal, {len(unequal):,} different; {read} of each model read")
    return 0


async def _compare(app: "App", args: argparse.Namespace, out: Out) -> Compared:
    from cakefs.engine.held import held
    from cakefs.engine.known.compare import compare
    from cakefs.engine.known.shown import Local
    from cakefs.engine.models.substitute import remember
    from cakefs.plan.pairs import pair_up

    with held(app.store, [args.a, args.b]) as (a, b):
        digests = {**Local.of_model(app.store, a).digests, **Local.of_model(app.store, b).digests}
        pairs = pair_up(a, b, digests, args.tensor)
        read: list[tuple[Pair, Similarity]] = []
        with out.progress(f"{args.a} and {args.b}", pairs.size) as advance:
            await compare(
                app.fetcher, app.reading, (a, b), pairs.open, lambda *found: read.append(found), Counted(advance)
            )
        remember(app.store, a, b, pairs, read)
    return Compared(pairs, read)


def _row(pair: "Pair", found: "Similarity") -> tuple[str, ...]:
    return (
        pair.name,
        pair.a.dtype,
        human_size(found.size),
        f"{10_000 * found.equal_bytes // found.size / 100:.2f} %",  # Down: what differs is never 100 %.
        f"{100 * found.flipped_bits / (8 * found.size):.3g} %",
        "-" if found.cosine is None else f"{found.cosine:.8f}",
        "-" if found.max_diff is None else f"{found.max_diff:.6g}",
    )


def _kind(tensor: Any) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _as_json(a: str, b: str, done: Compared) -> dict[str, object]:
    def kind(tensor: Any) -> dict[str, object]:
        return {"dtype": tensor.dtype, "shape": list(tensor.shape)}

    read = []
    for pair, found in done.read:
        diff = found.max_diff if found.max_diff is None or math.isfinite(found.max_diff) else "inf"
        read.append({"name": pair.name, "equal": found.equal, **kind(pair.a), **found._asdict(), "max_diff": diff})
    return {
        "a": a,
        "b": b,
        "equal": done.pairs.equal,
        "compared": read,
        "unlike": [{"name": p.name, "a": kind(p.a), "b": kind(p.b)} for p in done.pairs.unlike],
        "only_a": done.pairs.only_a,
        "only_b": done.pairs.only_b,
    }
