"""`python -m tests.fuzz`: fuzzes each target in a process of its own, for so many seconds, one after the other."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import NAMES
from tests.fuzz.engines import guided, has_atheris, hunt, limit_memory, load


def main() -> int:
    options = arguments()
    engine = options.engine if options.engine != "auto" else "atheris" if has_atheris() else "hypothesis"
    if options.inside:
        return inside(options.inside, options)
    failed = [name for name in options.target or NAMES if run(name, engine, options)]
    print(f"found something in: {', '.join(failed)}; inputs are in {options.keep}" if failed else "nothing found")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/fuzz", description="Feeds broken files to every parser of headers.")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default: 60)")
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; may be given several times")
    parser.add_argument("--engine", choices=("auto", "atheris", "hypothesis"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of hypothesis: another one tries other inputs")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where failing inputs are left")
    parser.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(name: str, engine: str, options: argparse.Namespace) -> int:
    print(f"== {name}, {options.seconds:g} s, {engine}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cakefs-fuzz-") as corpus:
        same = [f"--seconds={options.seconds}", f"--seed={options.seed}", f"--keep={options.keep}"]
        command = [sys.executable, "-m", "tests.fuzz", "--inside", name, "--engine", engine, "--corpus", corpus, *same]
        return subprocess.run(command, check=False).returncode


def inside(name: str, options: argparse.Namespace) -> int:
    """One target, in this process."""
    if options.engine == "atheris":
        guided(name, options.seconds, options.keep, options.corpus)
    limit_memory()
    return 0 if hunt(name, load(name), options.seconds, options.keep, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
