"""Runs the measurements and prints one table: `scripts/bench [CASE …] [--rounds N] [--json FILE] [--chart FILE]`."""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.cases import CASES
from tests.bench.chart import draw
from tests.bench.measure import Result


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each variant (default 5)")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    parser.add_argument("--chart", type=Path, help="also draw the ratios to this SVG file")
    parser.add_argument("--work", type=Path, help="directory for the data (default: a temporary one, needs 5 GB)")
    arguments = parser.parse_args()
    if unknown := set(arguments.case) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="cakefs-bench-") as work:
        for name in arguments.case or CASES:
            for result in CASES[name](Path(work), arguments.rounds):
                results.append(result)
                Console(stderr=True).print(f"{result.name}: {_value(result)}")
    table = Table("measured", "ratio", "bar", "", "detail")
    for r in results:
        table.add_row(r.name, _value(r), r.bar, {True: "met", False: "NOT MET", None: ""}[r.ok], r.detail)
    Console().print(table)
    if arguments.chart:
        arguments.chart.write_text(draw(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1))


def _value(result: Result) -> str:
    return "" if result.ratio is None else f"{result.ratio:.3f}" if result.ratio < 1000 else f"{result.ratio:.0f}"


if __name__ == "__main__":
    main()
