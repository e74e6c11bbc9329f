"""Command line of `scripts/stress`."""

import argparse
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests import conftest  # its environment: no test reaches the real Hub
from tests.crash.kit import crasher
from tests.crash.scenarios import SCENARIOS
from tests.hub import Hub
from tests.stress.soak import soak

EXAMPLES = 20  # Between two looks at the clock.


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/stress", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for each part (default 10)")
    parser.add_argument("--only", choices=("soak", "model", "crash"), help="one part (default: soak and model)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the soak's dice")
    options = parser.parse_args()
    ok = True
    print(f"seed {options.seed}", flush=True)
    if options.only == "crash":
        return crash()
    if options.only != "model":
        with tempfile.TemporaryDirectory(prefix="cakefs-stress-") as directory:
            ok &= not soak(60 * options.minutes, Path(directory), options.seed).violations
    if options.only != "soak":
        print(f"reference model: {model(60 * options.minutes)} examples, each right", flush=True)
    return 0 if ok else 1


def crash() -> int:
    """Every step and every state of every scenario; how long that takes is theirs to say."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="cakefs-crash-") as directory, crasher(Path(directory), 0) as crashes:
        for scenario in SCENARIOS:
            for how in ("kill", "cut"):
                done = crashes.crash(how, scenario)
                print(f"{how} {scenario}: {done.total}, {len(done.failed)} did not hold", flush=True)
                failed += done.failed
    print("".join(f"  DID NOT HOLD: {text}\n" for text in failed), end="")
    return 1 if failed else 0


def model(seconds: float) -> int:
    """The reference model, other examples each time; raises with the shrunken steps when one is wrong."""
    from tests.reference_model import Engine

    assert conftest
    logging.disable(logging.CRITICAL)
    long = settings(
        max_examples=EXAMPLES,
        stateful_step_count=40,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    examples, until = 0, time.monotonic() + seconds
    with Hub() as hub:
        while time.monotonic() < until:
            run_state_machine_as_test(lambda: Engine(hub), settings=long)
            examples += EXAMPLES
    return examples


if __name__ == "__main__":
    sys.exit(main())
