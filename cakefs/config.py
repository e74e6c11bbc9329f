"""Settings as one frozen value: flags win over the environment, the environment over the config file.

The config file is TOML with the field names below as keys: `$CAKEFS_CONFIG`, else `cakefs/config.toml` in the XDG
config directory. The Hub's own variables keep their meaning.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from cakefs.errors import UserError

DEFAULT_ENDPOINT = "https://huggingface.co"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attributes:
    store: Directory of the store.
    mountpoint: Where `cakefs mount` mounts.
    endpoint: The Hub, without a trailing slash.
    offline: Never ask the network; what is not local is an error.
    read_timeout_s: How long one read may wait for the network before it fails with ETIMEDOUT.
    workers: Transfer processes beside the serving process.
    connections: Concurrent ranged requests of each of them.
    allow_other: Let other users see the mount (needs user_allow_other in /etc/fuse.conf unless root).
    readahead: Fetch ahead of the reader, as far as its pattern gives reason; off for measurements.
    """

    store: Path
    mountpoint: Path
    endpoint: str = DEFAULT_ENDPOINT
    offline: bool = False
    read_timeout_s: float = 60.0
    workers: int = 2
    connections: int = 4
    allow_other: bool = False
    readahead: bool = True


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Config:
    """Merges flags (None = not given), environment and file. Raises UserError naming the setting that is wrong."""
    values: dict[str, Any] = {
        "store": platformdirs.user_data_path("cakefs"),
        "mountpoint": Path.home() / "models",
        **_from_file(environ),
        **_from_environment(environ),
        **{name: value for name, value in flags.items() if value is not None},
    }
    for name in ("store", "mountpoint"):
        values[name] = Path(os.path.abspath(Path(values[name]).expanduser()))
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise UserError(f"bad setting: {error}") from error
    if not re.match(r"https?://[^/]+", config.endpoint):
        raise UserError(f"bad endpoint {config.endpoint!r}", hint="HF_ENDPOINT looks like https://huggingface.co")
    return msgspec.structs.replace(config, endpoint=config.endpoint.rstrip("/"))


def _from_file(environ: Mapping[str, str]) -> dict[str, Any]:
    named = environ.get("CAKEFS_CONFIG")
    path = Path(named).expanduser() if named else platformdirs.user_config_path("cakefs") / "config.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        if named:
            raise UserError(f"no such config file: {path}", hint="CAKEFS_CONFIG names it") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if store := environ.get("CAKEFS_STORE"):
        values["store"] = store
    if endpoint := environ.get("HF_ENDPOINT"):
        values["endpoint"] = endpoint
    if "HF_HUB_OFFLINE" in environ:
        values["offline"] = environ["HF_HUB_OFFLINE"].upper() in ("1", "TRUE", "YES", "ON")
    return values


def log_directory() -> Path:
    """Where a mount in the background writes its log."""
    return platformdirs.user_log_path("cakefs")
