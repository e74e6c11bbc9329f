"""Models that several oracle tests share."""

from pathlib import Path

import pytest

from tests.oracle.models import save_all


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    save_all(root)
    return root
