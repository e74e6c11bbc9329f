"""The manual is what the code says: help by topic, the man page; and what was logged before a command fails."""

import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cakefs.cli import gc, manual
from cakefs.cli.main import COMMANDS, main
from cakefs.config import Config
from cakefs.engine.transfer.repeats import Repeats
from cakefs.errors import AccessDenied


def test_help_of_a_command_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "pull"]) == 0
    said = capsys.readouterr().out
    assert main(["pull", "--help"]) == 0
    assert capsys.readouterr().out == said


def test_help_names_its_topics_and_explains_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    said = capsys.readouterr().out
    for topic, (about, _) in manual.topics().items():
        assert re.search(rf"^    {re.escape(topic)} +{about}$", said, re.MULTILINE)
        assert main(["help", topic]) == 0
        assert len(capsys.readouterr().out.splitlines()) >= 8
    assert main(["help", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_each_setting_is_explained() -> None:
    text = manual.settings()
    assert all(re.search(rf"^  {name} +\S", text, re.MULTILINE) for name in Config.__struct_fields__)


def test_each_exit_code_is_explained() -> None:
    codes = [int(line.split()[0]) for line in manual.exit_codes().splitlines()]
    assert codes == sorted({*codes, 0, 1, 2, 10, 11, 12, 13, 20, 21, 30, 70, 130})


@pytest.mark.skipif(not shutil.which("man"), reason="man (man-db) is absent")
def test_the_man_page_is_well_formed_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "--man"]) == 0
    page = tmp_path / "cakefs.1"
    page.write_text(capsys.readouterr().out)
    environment = {"PATH": "/usr/bin:/bin", "MANWIDTH": "150", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""}
    done = subprocess.run(
        ["man", "--warnings", "-P", "cat", "-l", page], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr == ""
    text = re.sub(".\b", "", done.stdout)
    for command in COMMANDS:
        assert re.search(rf"^   cakefs {command}\b", text, re.MULTILINE), command
    assert all(
        option in text for option in ("--ratio-repeat S:E,...", "--no-on-demand", "`cakefs ls` shows it", "~/models")
    )


@pytest.mark.parametrize(
    ("logged", "said"),
    [
        (["bytes 0-9 of f: refused (403)"] * 3, []),
        (["bytes 0-9 of f: refused (403)", "bytes 9-18 of f: refused (403)"], []),
        (["the store is full"], ["warning: the store is full"]),
        (
            ["bytes 0-9 of f: reset", "bytes 9-18 of f: reset", "other"],
            ["warning: bytes 9-18 of f: reset", "warning: other"],
        ),
        (["other", "bytes 0-9 of f: refused (403)"], ["warning: other"]),
    ],
)
def test_what_was_logged_before_a_failure_is_said_once(
    logged: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        for line in logged:
            logging.getLogger("cakefs.test").warning("%s", line)
        raise AccessDenied("hub refused f: refused (403)", hint="log in")

    monkeypatch.setattr(gc, "run", run)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main(["gc"]) == AccessDenied.exit_code
    assert capsys.readouterr().err.splitlines() == [*said, "error: hub refused f: refused (403)", "hint: log in"]


def test_a_cause_is_logged_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cakefs.engine.transfer.repeats.time.monotonic", lambda: now)
    repeats = Repeats()

    def passes(start: int, cause: str) -> str | None:
        record = logging.LogRecord("n", logging.WARNING, "", 0, "bytes %d of f: %s", (start, cause), None)
        return record.getMessage() if repeats.filter(record) else None

    assert [passes(i, "reset") for i in range(3)] == ["bytes 0 of f: reset", None, None]
    assert passes(0, "other") == "bytes 0 of f: other"
    now = 131.0
    assert passes(7, "reset") == "bytes 7 of f: reset (and 2 more like this)"
    assert passes(8, "reset") is None
