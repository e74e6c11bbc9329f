"""`cakefs diff`: which tensors of two models are equal, without a look at their bytes."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, without_gc
from cakefs.cli.out import Out, human_size

if TYPE_CHECKING:
    from cakefs.plan.diff import Diff

HELP = "tell which tensors of two models are equal, different, or in one only"
EPILOG = """\
Nothing is fetched. Equal files are known by their published hashes, tensors that are here by their bytes, others by
imported hashes.json; of the rest nothing is known.

  model.layers 0-7  ██░░▒▒??     █ equal  ░ different  ▒ some of it equal  ? unknown  < > only in A, in B
"""
MARKS = {"equal": "█", "unknown": "?", "only_a": "<", "only_b": ">"}
DIFFERENT, MIXED = "░", "▒"
WORDS = {"equal": "equal", "different": "different", "only_a": "only in A", "only_b": "only in B", "unknown": "unknown"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("a", metavar="A", help="a model, as `cakefs ls` shows it")
    parser.add_argument("b", metavar="B", help="the other one")
    parser.add_argument("-t", "--tensors", action="store_true", help="a line for each tensor")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known import knowing, survey

    with without_gc(), survey.open_store(config_of(args).store) as store:
        a, b = survey.find_model(store, args.a), survey.find_model(store, args.b)
        diff = knowing.diff(store, a, b)
    if args.json:
        out.json(_as_json(args.a, args.b, diff))
    elif args.tensors:
        _show_tensors(diff, out)
    elif out.quiet:
        for row in diff.rows:
            if row.state != "equal":
                out.line(row.name)
    else:
        _show(diff, out)
        if any(row.state == "unknown" for row in diff.rows):
            out.hint(f"what is not here, or is calculated, has to be read: cakefs compare {args.a} {args.b}")
    return 0


def mark(cell: Mapping[str, int]) -> str:
    """One character for a layer."""
    if len(cell) == 1:
        return MARKS.get(next(iter(cell)), DIFFERENT)
    if cell.get("equal"):
        return MIXED
    return MARKS["unknown"] if cell.keys() <= {"equal", "unknown"} else DIFFERENT


def _show(diff: "Diff", out: Out) -> None:
    from cakefs.cli.bars import draw_groups
    from cakefs.plan.diff import group_cells

    for line in draw_groups(group_cells((r.name, r.state, max(r.size_a, r.size_b)) for r in diff.rows), mark):
        out.picture(line, DIFFERENT + MIXED)
    out.line("")
    totals = diff.totals()
    rows = [
        (WORDS[state], f"{total.tensors:,}", human_size(total.bytes_a), human_size(total.bytes_b))
        for state, total in totals.items()
        if total.tensors
    ]
    out.table(("", ">TENSORS", ">BYTES OF A", ">BYTES OF B"), rows)
    claimed = sum(row.claimed for row in diff.rows)
    if claimed:
        out.line(f"{claimed:,} of them by an imported hashes.json alone")
    retyped = sum(row.retyped for row in diff.rows)
    if retyped:
        out.line(f"{retyped:,} equal tensors have another dtype or shape")
    twins = sum(bool(row.twin) for row in diff.rows)
    if twins:
        out.line(f"{twins:,} are in the other model under another name (--tensors)")


def _show_tensors(diff: "Diff", out: Out) -> None:
    def note(state: str, claimed: bool, retyped: bool, twin: str) -> str:
        said = [f"is {twin}" if twin else "", "another dtype or shape" if retyped else "", "claimed" if claimed else ""]
        return f"{WORDS[state]} ({', '.join(filter(None, said))})" if any(said) else WORDS[state]

    out.table(
        ("TENSOR", ">BYTES OF A", ">BYTES OF B", "STATE"),
        [
            (r.name, human_size(r.size_a), human_size(r.size_b), note(r.state, r.claimed, r.retyped, r.twin))
            for r in diff.rows
        ],
    )


def _as_json(a: str, b: str, diff: "Diff") -> dict[str, object]:
    from cakefs.cli.bars import groups_as_json
    from cakefs.plan.diff import group_cells

    cells = group_cells((r.name, r.state, max(r.size_a, r.size_b)) for r in diff.rows)
    return {
        "a": a,
        "b": b,
        **{state: total._asdict() for state, total in diff.totals().items()},
        "layers": groups_as_json(cells, mark),
        "tensors": [row._asdict() for row in diff.rows],
    }
