"""A short soak in every run; `scripts/stress` is the long one."""

from pathlib import Path

import pytest

from tests.mounts import needs_fuse
from tests.stress.soak import soak

SECONDS = 20


@needs_fuse
@pytest.mark.timeout(300)
def test_a_soak_under_kills_evictions_and_a_broken_network_serves_no_wrong_byte(tmp_path: Path) -> None:
    world = soak(SECONDS, tmp_path, seed=8)
    assert world.violations == []
    assert world.counts["reads"] > 50 and world.counts["kills"] and world.counts["faults"]
