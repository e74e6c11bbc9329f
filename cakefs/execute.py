"""Starting cakefs again as another process: executed anew, never forked, as no LMDB environment crosses a fork."""

import os
import sys
import sysconfig
from pathlib import Path


def python_command(module: str, *arguments: str) -> list[str]:
    """Runs a module with our interpreter; `-P`: a file in the user's directory must not replace one of ours."""
    return [sys.executable, "-P", "-m", module, *arguments]


TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def child_environment() -> dict[str, str]:
    """`import_environment` without the Hub's token: our own children are told it in another way, if at all."""
    return {name: value for name, value in import_environment().items() if name not in TOKENS}


def import_environment() -> dict[str, str]:
    """Our environment, in which a source tree that is not installed is found as well."""
    place = str(Path(__file__).resolve().parents[1])
    paths = [p for p in (os.environ.get("PYTHONPATH"),) if p]
    if place not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths.insert(0, place)
    return os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})
