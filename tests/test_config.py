"""Settings: which of several holds, and a wrong one is an error that names it, before anything is done with it."""

from pathlib import Path

import pytest

from cakefs.config import Config, load_config
from cakefs.errors import UserError


def load(directory: Path, text: str | bytes, **environment: str) -> Config:
    file = directory / "config.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config({}, {"CAKEFS_CONFIG": str(file), **environment})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("store = 5", "store is no path: 5"),
        ('store = ""', "store is no path: ''"),
        ('mountpoint = ["a"]', "mountpoint is no path"),
        ('mountpoint = "\\u0000"', "mountpoint is no path"),
        ("hub_cache = 1.5", "hub_cache is no path"),
        ("nonsense = 1", "nonsense"),
        ("workers = 0", "workers"),
        ("workers = 1000", "workers"),
        ("connections = 0", "connections"),
        ("read_timeout_s = 0", "read_timeout_s"),
        ("read_timeout_s = -1.0", "read_timeout_s"),
        ("read_timeout_s = nan", "read_timeout_s"),
        ("read_timeout_s = inf", "read_timeout_s"),
        ('read_timeout_s = "60"', "read_timeout_s"),
        ("stop_grace_s = -1", "stop_grace_s"),
        ("limit = -5", "limit"),
        ("limit = true", "limit"),
        ('limit = "much"', "not a size: 'much'"),
        ('offline = "yes"', "offline"),
        ("endpoint = 7", "endpoint"),
        ('endpoint = "ftp://host"', "bad endpoint 'ftp://host'"),
        ('endpoint = "https://"', "bad endpoint"),
        ('endpoint = "http://[::1"', "bad endpoint"),
        ('endpoint = "http://host:99999"', "bad endpoint"),
        ("[table]", "table"),
        ("store =", "cannot read config file"),
        (b"store = '\xff'", "cannot read config file"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as raised:
        load(tmp_path, text)
    assert says in raised.value.message
    assert "\n" not in raised.value.message


def test_an_unknown_setting_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("offlin = true\n")
    with pytest.raises(UserError, match=f"config file {path}: no setting 'offlin'") as raised:
        load_config({}, {"CAKEFS_CONFIG": str(path)})
    assert raised.value.hint == "did you mean offline?"


def test_a_config_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read config file {tmp_path}: Is a directory"):
        load_config({}, {"CAKEFS_CONFIG": str(tmp_path)})
    with pytest.raises(UserError, match="no such config file: ~nobody-of-that-name/x"):
        load_config({}, {"CAKEFS_CONFIG": "~nobody-of-that-name/x"})


def test_flags_win_over_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = (
        'store = "/file"\nendpoint = "http://file/"\noffline = false\nlimit = "2 kB"\nhub_cache = ""\nstop_grace_s = 0'
    )
    config = load(tmp_path, text)
    assert (config.store, config.endpoint, config.limit, config.hub_cache) == (Path("/file"), "http://file", 2000, None)
    environment = {"CAKEFS_STORE": "/environment", "HF_ENDPOINT": "http://environment", "HF_HUB_OFFLINE": "1"}
    config = load(tmp_path, text, **environment)
    assert (config.store, config.endpoint, config.offline) == (Path("/environment"), "http://environment", True)
    environment["CAKEFS_CONFIG"] = str(tmp_path / "config.toml")
    config = load_config({"store": "/flag", "endpoint": "http://flag", "offline": None}, environment)
    assert (config.store, config.endpoint, config.offline) == (Path("/flag"), "http://flag", True)


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user who is in no table, in a container."""
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.delenv("HOME")
    with pytest.raises(UserError) as raised:
        load_config({}, {})
    assert raised.value.hint == "set HOME"
