"""Two ways to make inputs: atheris, guided by coverage, where it is installed; else hypothesis, which the tests have.

Both start from the seeds beside this file, stop after the seconds given, and leave an input that a target fails on as a
file. Memory is limited, so that a parser that believes a size fails too.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

Target = Callable[[bytes], bool]  # whether the bytes were accepted; raises what is wrong with the parser
SEEDS = Path(__file__).parent / "seeds"
MEMORY = 3 * 1024**3
_MAX_INPUT = 8192
_BATCH = 100
_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def seeds(name: str) -> list[bytes]:
    """Inputs of a target to start from."""
    return [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]


# --- hypothesis -------------------------------------------------------------------------------------------------------

Edit = tuple[int, float, int, bytes]


def mutate(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Applies edits, each a kind, a place between 0 and 1, a number and some bytes."""
    out = bytearray(data)
    for kind, place, value, text in edits:
        at = int(place * len(out))
        if kind < 4:  # overwrite with a number of 1, 2, 4 or 8 bytes
            width = 1 << kind
            out[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif kind == 4:
            out[at:at] = text
        elif kind == 5:
            del out[at : at + 1 + value % 64]
        elif kind == 6:
            out[at:at] = out[at : at + 1 + value % 256]
        else:
            del out[at:]
    return bytes(out[:_MAX_INPUT])


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """A seed with some edits."""
    number = st.sampled_from(_NUMBERS) | st.integers(0, 2**64 - 1)
    edit = st.tuples(st.integers(0, 7), st.floats(0, 1, exclude_max=True), number, st.binary(max_size=16))
    return st.builds(mutate, st.sampled_from(seeds(name)), st.lists(edit, max_size=6))


def hunt(name: str, target: Target, seconds: float, keep: Path, first_seed: int = 0) -> bool:
    """Runs batches of examples until the time is up; False, and a file in `keep`, when one failed."""
    deadline = time.monotonic() + seconds
    failing: list[bytes] = []
    count = accepted = batch = 0

    @settings(max_examples=_BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(name))
    def run(data: bytes) -> None:
        nonlocal count, accepted
        failing[:] = [data]  # the last one run is the smallest that fails
        count += 1
        accepted += target(data)

    while time.monotonic() < deadline or not batch:
        try:
            seed(first_seed + batch)(run)()
        except Exception as error:
            found = _save(keep, name, failing[0])
            print(f"{name}: {type(error).__name__}: {error}\n  input: {found}", file=sys.stderr)
            return False
        batch += 1
    print(f"{name}: {count} inputs, {accepted} accepted")
    return True


def _save(keep: Path, name: str, data: bytes) -> Path:
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


# --- atheris ----------------------------------------------------------------------------------------------------------


def has_atheris() -> bool:
    return find_spec("atheris") is not None


def guided(name: str, seconds: float, keep: Path, corpus: Path) -> None:
    """Runs libFuzzer, which ends the process: with status 0 when nothing was found.

    Args:
        corpus: An empty directory for the inputs that reach something new.
    """
    import atheris

    with atheris.instrument_imports(include=["cakefs"]):  # so it must not have been imported before
        target = load(name)
    keep.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={max(1, round(seconds))}", f"-max_len={_MAX_INPUT}", "-rss_limit_mb=3072"]
    options += [f"-artifact_prefix={keep}/{name}-", "-print_final_stats=1", "-timeout=30"]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(SEEDS / name)], target)
    atheris.Fuzz()


def load(name: str) -> Target:
    from tests.fuzz.targets import TARGETS, check

    return partial(check, TARGETS[name])


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
