"""`cakefs doctor`: what stands between this machine and a working mount, with the exact fix. Says, never mends."""

import resource
from collections.abc import Iterator
from pathlib import Path

from cakefs.cli.checks.check import Check
from cakefs.cli.checks.machine import check_allow_other, check_device, check_fusermount, check_kernel, check_open_files
from cakefs.cli.checks.mounts import check_mounts
from cakefs.cli.checks.outside import check_hub, check_libraries
from cakefs.cli.checks.store import check_store
from cakefs.config import Config

__all__ = ["Check", "diagnose"]


def diagnose(config: Config, *, token: Check, root: Path = Path("/")) -> Iterator[Check]:
    """Yields each check as soon as it is known, the Hub last. Takes some seconds at most.

    Args:
        token: As `check_token` has it; the token itself is not wanted here.
        root: Below which /dev, /etc, /proc and /sys are looked up.
    """
    yield check_device(root)
    yield check_fusermount()
    yield check_kernel(root)
    yield check_allow_other(root, config.allow_other)
    yield from check_mounts(root)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield from check_store(config.store, root)
    yield check_libraries()
    yield token
    yield check_hub(config.endpoint, config.offline)
