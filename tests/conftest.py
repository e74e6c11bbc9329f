"""Fixtures that all tests share, and an environment in which no test can reach the real Hub or the user's token."""

import atexit
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

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
from tests.hub.odd import self_signed  # noqa: E402
from tests.mounts import AMISS, FETCHING  # noqa: E402

# Whoever runs the tests in the background may have these ignored, and programs that we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run, however slow the machine is.
settings.register_profile("cakefs", deadline=None, derandomize=True, database=None)
settings.load_profile("cakefs")


# What cakefs warns of in tests that provoke it, by the beginning of their names. Nothing else may be said in any test,
# by this process or by one that it starts, commands among them.
_STORE = "do not match their recorded sum|is gone or damaged as a whole|is gone or has changed"
_UPSTREAM = f"{FETCHING}|the bytes do not have the published hash|came wrong, and is fetched again"
_FULL = "the store is full|not sealed, still served"
_ABSENT = "is not added on demand: "
_SHOWN = "shown under .cakefs/original only: |shown as it is: |are shown, but not merged: "
PROVOKED = {
    "test_api": f"{_UPSTREAM}|{_ABSENT}",
    "test_cli_e2e": f"{_STORE}|{_UPSTREAM}|{_FULL}",
    "test_corruption": _STORE,
    "test_demand": _ABSENT,
    "test_engine": f"{_UPSTREAM}|{_FULL}|a transfer process (ended|hangs)",
    "test_engine_worker": _STORE,
    "test_evict.py::test_what_comes_back_is_confirmed_again": _UPSTREAM,
    "test_evict.py::test_what_was_set_aside": _STORE,
    "test_export": _STORE,
    "test_faults_add": "trying again in ",
    "test_faults_read.py::test_bytes_that_another_process_found_wrong": _UPSTREAM,
    "test_fs_": "cannot read |lookup: |did not answer within",
    "test_fs_mount.py::test_failed_reads": "unexpected failure|Traceback",
    "test_fs_ops": "unexpected failure",
    "test_fsspec": _ABSENT,
    "test_gguf_": _SHOWN,
    "test_hashes.py::test_a_damaged_blob_gets_no_hash": f"{_STORE}|no longer matches its digest",
    "test_hashes": f"{_UPSTREAM}|what is claimed of its tensors is wrong",
    "test_import": f"{_STORE}|does not have the bytes that its name promises",
    "test_model": f"{_STORE}|{_UPSTREAM}",
    "test_recover": _STORE,
    "test_remotes_": f"{_UPSTREAM}|trying again in ",
    "test_resources": "cannot write to .*: Read-only file system",
    "test_store_": _STORE,
    "test_torch_served": _SHOWN,
    "test_verify": f"{_STORE}|{_UPSTREAM}",
}


class Heard(logging.Handler):
    """What cakefs says, and what it stands on. Loaders' and mergekit's own warnings depend on their release."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("cakefs", "pyfuse3", "trio")):
            self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


def unprovoked(item: pytest.Item, lines: Iterable[str]) -> list[str]:
    """Those of these lines that a test does not mean to cause."""
    name = f"{item.path.name}::{item.name}"
    provoked = [pattern for prefix, pattern in PROVOKED.items() if name.startswith(prefix)]
    return [line for line in lines if not (provoked and re.search("|".join(provoked), line))]


@pytest.fixture(autouse=True)
def nothing_unexpected_is_logged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in whose process cakefs warns, unless the test looks at what is logged (`caplog`)."""
    heard = Heard()
    logging.getLogger().addHandler(heard)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(heard)
    assert "caplog" in request.fixturenames or unprovoked(request.node, heard.lines) == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Fails a test while which a process that has our stderr complained, such as a transfer process."""
    report = yield
    if call.when == "teardown" and report.passed:
        said = unprovoked(item, filter(AMISS.search, report.capstderr.splitlines()))
        if said:
            report.outcome, report.longrepr = "failed", "\n".join(["said on stderr, and not meant to be:", *said])
    return report


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate for localhost that nobody has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A loopback Hugging Face Hub, CDN and plain web server."""
    with Hub() as hub:
        yield hub
