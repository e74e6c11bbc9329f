"""The fuzzers: every seed passes, a short run finds nothing, and a bug that is there is found and kept."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import NAMES
from tests.fuzz.engines import SEEDS, hunt, inputs, load, seeds
from tests.fuzz.targets import TARGETS


def test_every_target_has_seeds() -> None:
    assert sorted(TARGETS) == sorted(NAMES) == sorted(path.name for path in SEEDS.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_seeds_pass(name: str) -> None:
    """Most are accepted: a seed that is refused at once leads nowhere."""
    target = load(name)
    accepted = [target(data) for data in seeds(name)]
    assert 2 * sum(accepted) > len(accepted)
    assert all(len(data) <= 4096 for data in seeds(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_finds_nothing(name: str) -> None:
    target = load(name)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.one_of(inputs(name), st.binary(max_size=64)))
    def run(data: bytes) -> None:
        target(data)

    run()


def test_a_bug_is_found_and_its_input_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def target(data: bytes) -> bool:
        return bool(1 // (b"map" in data))

    assert not hunt("index", target, 60, tmp_path / "found")
    (kept,) = (tmp_path / "found").iterdir()
    assert b"map" not in kept.read_bytes()
    assert re.search(f"ZeroDivisionError: .*by zero\n  input: {re.escape(str(kept))}", capsys.readouterr().err)


def test_command_stops_in_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds=0.1", "--engine=hypothesis", "--target=index"]
    done = subprocess.run([*command, f"--keep={tmp_path}"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[0] == "== index, 0.1 s, hypothesis"
    assert done.stdout.splitlines()[-1] == "nothing found"
    assert not list(tmp_path.iterdir())
