"""`python -m tests.fuzz`: fuzzes each target in a process of its own, for so many seconds, one after the other."""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.engines import has_atheris, one
from tests.fuzz.targets import TARGETS


def main() -> int:
    options = arguments()
    engine = options.engine if options.engine != "auto" else "atheris" if has_atheris() else "hypothesis"
    if options.inside:
        return one(options.inside, options.seconds, options.keep, engine=engine, first_seed=options.seed)
    failed = [name for name in options.target or TARGETS if run(name, engine, options)]
    print(f"found something in: {', '.join(failed)}; inputs are in {options.keep}" if failed else "nothing found")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/fuzz", description="Feeds broken files to every parser of headers.")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default: 60)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be given several times")
    parser.add_argument("--engine", choices=("auto", "atheris", "hypothesis"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of hypothesis: another one tries other inputs")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where failing inputs are left")
    parser.add_argument("--inside", choices=TARGETS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(name: str, engine: str, options: argparse.Namespace) -> int:
    same = [f"--seconds={options.seconds}", f"--engine={engine}", f"--seed={options.seed}", f"--keep={options.keep}"]
    print(f"== {name}, {options.seconds:g} s, {engine}", flush=True)
    return subprocess.run([sys.executable, "-m", "tests.fuzz", "--inside", name, *same], check=False).returncode


sys.exit(main())
