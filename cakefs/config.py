"""Settings as one frozen value: flags win over the environment, the environment over the config file.

The config file is TOML with the field names below as keys: `$CAKEFS_CONFIG`, else `cakefs/config.toml` in the XDG
config directory. The Hub's own variables keep their meaning.
"""

import os
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import platformdirs
from msgspec import Meta

from cakefs.errors import UserError

DEFAULT_ENDPOINT = "https://huggingface.co"
LONGEST_S = 86_400.0 * 365


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
    on_demand: Add a model of the Hub when its name is looked up in the mount.
    metrics: Where a mount serves its counters for Prometheus: unix:/path or 127.0.0.1:PORT; empty for nowhere.
    stop_grace_s: How long a mount that is told to end lets those who read go on.
    limit: Bytes that the store may take, or text such as "200 GB"; least recently used tensors make room. 0: no limit.
    hub_cache: The cache of huggingface_hub, where `add` looks first; none is looked at when this is empty.
    readahead: Fetch ahead of the reader, as far as its pattern gives reason; off for measurements.
    """

    store: Path
    mountpoint: Path
    endpoint: str = DEFAULT_ENDPOINT
    offline: bool = False
    read_timeout_s: Annotated[float, Meta(gt=0, le=LONGEST_S)] = 60.0
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    connections: Annotated[int, Meta(ge=1, le=64)] = 4
    allow_other: bool = False
    on_demand: bool = True
    metrics: str = ""
    stop_grace_s: Annotated[float, Meta(ge=0, le=LONGEST_S)] = 60.0
    limit: Annotated[int, Meta(ge=0)] = 0
    hub_cache: Path | None = None
    readahead: bool = True


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Config:
    """Merges flags (None = not given), environment and file. Raises UserError naming the setting that is wrong."""
    values: dict[str, Any] = {
        "store": _of_user(platformdirs.user_data_path),
        "mountpoint": "~/models",
        "hub_cache": hub_cache(environ),
        **_from_file(environ),
        **_from_environment(environ),
        **{name: value for name, value in flags.items() if value is not None},
    }
    values["hub_cache"] = values["hub_cache"] or None
    for name in ("store", "mountpoint", "hub_cache"):
        values[name] = None if values[name] is None else _absolute(name, values[name])
    if isinstance(values.get("limit"), str):
        values["limit"] = parse_size(values["limit"])
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise UserError(f"bad setting: {error}") from error
    _check_endpoint(config.endpoint)
    return msgspec.structs.replace(config, endpoint=config.endpoint.rstrip("/"))


def _absolute(name: str, value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise UserError(f"bad setting: {name} is no path: {value!r}")
    return Path(os.path.abspath(os.path.expanduser(value)))


def _check_endpoint(endpoint: str) -> None:
    try:
        url = urlsplit(endpoint)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # such as a port that cannot be
        good = False
    if not good:
        raise UserError(f"bad endpoint {endpoint!r}", hint="HF_ENDPOINT looks like https://huggingface.co")


def parse_size(text: str) -> int:
    """`200 GB`, `1.5TiB`, `500M`, `1000000`: bytes. Powers of 1000, with an i of 1024. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise UserError(f"not a size: {text!r}", hint="such as 200 GB, 1.5 TiB or 1000000000")
    power = " kmgtp".index(match[2].lower() or " ")
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


def _from_file(environ: Mapping[str, str]) -> dict[str, Any]:
    named = environ.get("CAKEFS_CONFIG")
    path = Path(os.path.expanduser(named)) if named else _of_user(platformdirs.user_config_path) / "config.toml"
    try:
        text = path.read_text()
        import tomllib  # only for those who have such a file

        values = tomllib.loads(text)
    except FileNotFoundError:
        if named:
            raise UserError(f"no such config file: {path}", hint="CAKEFS_CONFIG names it") from None
        return {}
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no TOML
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read config file {path}: {reason}") from error
    for name in sorted(values.keys() - {*Config.__struct_fields__}):
        from difflib import get_close_matches

        near = get_close_matches(name, Config.__struct_fields__, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(Config.__struct_fields__))}"
        raise UserError(f"config file {path}: no setting {name!r}", hint=hint)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if store := environ.get("CAKEFS_STORE"):
        values["store"] = store
    if endpoint := environ.get("HF_ENDPOINT"):
        values["endpoint"] = endpoint
    if "HF_HUB_OFFLINE" in environ:
        values["offline"] = environ["HF_HUB_OFFLINE"].upper() in ("1", "TRUE", "YES", "ON")
    return values


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads, by its own variables; one that names the cache which a mount shows
    says nothing about that.
    """
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if named and Path(named).parts[-2:] != (".cakefs", "hub"):
        return Path(named)
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or Path(base, "huggingface")) / "hub"


def log_directory() -> Path:
    """Where a mount in the background writes its log."""
    return _of_user(platformdirs.user_log_path)


def _of_user(place: Callable[[str], Path]) -> Path:
    """A directory of this user's."""
    try:
        return place("cakefs")
    except RuntimeError as error:  # one without a home, as in some containers
        raise UserError("your home directory is not known", hint="set HOME") from error
