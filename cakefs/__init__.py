"""cakefs: every ML model as an ordinary directory, lazily fetched and stored once per tensor.

In a program, without FUSE: `cakefs.open("org/name/model.safetensors")` and `cakefs.safe_open("org/name")`. Nothing is
imported before one of them is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cakefs.api.files import open
    from cakefs.api.session import close
    from cakefs.api.tensors import safe_open

__version__ = "0.1.0"
__all__ = ["__version__", "close", "open", "safe_open"]

_HOMES = {"open": "files", "close": "session", "safe_open": "tensors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cakefs' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"cakefs.api.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
