"""Fixtures that all tests share, and an environment in which no test can reach the real Hub or the user's token."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "CAKEFS_"))]:
    del os.environ[name]
# Read by huggingface_hub when it is imported, so set here and not in a fixture. Nothing listens on port 9 (discard).
os.environ["HF_ENDPOINT"] = "http://localhost:9"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cakefs-tests-hf-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

from tests.hub import Hub  # noqa: E402

# Whoever runs the tests in the background may have these ignored, and programs that we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run, however slow the machine is.
settings.register_profile("cakefs", deadline=None, derandomize=True, database=None)
settings.load_profile("cakefs")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A loopback Hugging Face Hub, CDN and plain web server."""
    with Hub() as hub:
        yield hub
