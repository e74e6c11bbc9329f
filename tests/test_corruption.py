"""Every file of a store damaged in every way: what is served of it is right, or an error; and it heals from upstream.

Files that are borrowed are in `test_import.py`, a format file in `test_store_open.py`, upstream's wrong bytes in
`test_faults_read.py`.
"""

from collections.abc import Iterator

import pytest

from tests.crash.damages import DAMAGES
from tests.crash.kit import Crasher, crasher


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crasher]:
    with crasher(tmp_path_factory.mktemp("damage"), 0) as crashes:
        yield crashes


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_never_served_and_heals(crashes: Crasher, damage: str) -> None:
    assert crashes.crash("damage", damage).failed == []
