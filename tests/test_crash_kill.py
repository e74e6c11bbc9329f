"""kill -9 at the steps of whatever changes the store: every read is right, what had come is not fetched again, `verify`
is content, and `gc` leaves nothing over.

A step is a call by which a file changes, a page of the middle of a large write, or a commit of the catalog. These runs
take some steps of each scenario; `scripts/stress --only crash` takes them all.
"""

from collections.abc import Iterator

import pytest

from tests.crash.kit import MOST, Crasher, crasher
from tests.crash.scenarios import SCENARIOS


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crasher]:
    with crasher(tmp_path_factory.mktemp("kill"), MOST) as crashes:
        yield crashes


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_any_step_nothing_is_wrong_lost_or_left_over(crashes: Crasher, scenario: str) -> None:
    done = crashes.crash("kill", scenario)
    assert done.failed == []
    assert done.total > 0, "the shim met no step"
