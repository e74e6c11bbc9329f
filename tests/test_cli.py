"""The command line without store, hub or mount: the table of commands, help, exit codes, what goes where."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cakefs import __version__, errors
from cakefs.cli import gc
from cakefs.cli.main import COMMANDS, LogLines, build_parser, main
from cakefs.cli.out import Out, counted, human_size, printable
from cakefs.errors import CakeError, RemoteUnavailable, UserError
from tests.models import llama, single

ROOT = Path(__file__).parent.parent
HEAVY = {"trio", "httpx", "lmdb", "rich", "huggingface_hub", "pyfuse3", "msgspec", "numpy"}
KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, CakeError)]

# What other programs may rely on: nothing of it is renamed.
CONTRACT = [
    "mount",
    "mount M",
    "mount M -f --offline --no-on-demand --limit 200GB --allow-other",
    "mount --foreground M",
    "mount --metrics 127.0.0.1:9400",
    "umount",
    "umount M",
    "add org/name",
    "add org/name@rev --as N",
    "add https://h/x.gguf --revision R --update",
    "ls --json",
    "show M --tensors --json",
    "plan M --layers 0-15,20 --json",
    "pull M",
    "pull M --layers 0-3,8-11 --files *.json --files a",
    "diff A B --json",
    "compare A B --tensor N --json",
    "slice M --layers 0-15,20 --as N --with-embeddings --with-head",
    "merge R.yml --as N",
    "merge M --ratio-repeat 0:.3,.2:.4,.4:1 --as N",
    "merge M --repeat-map 0,1,2,1,2,3 --as N",
    "export M D",
    "export M D --reflink auto --file N",
    "export M D --reflink always",
    "export M D --reflink never",
    "import hub-cache",
    "import ollama --copy",
    "import ./directory --copy",
    "hashes M",
    "hashes --import F",
    "hashes --import https://h/hashes.json M",
    "verify",
    "verify M --repair",
    "pin M",
    "unpin M",
    "rm M",
    "gc",
    "gc --dry-run",
    "evict M",
    "evict M --dry-run",
    "status --json --watch",
    "report -o F.html",
    "report A B -o F.html",
    "doctor",
    "service install",
    "service uninstall",
    "service status",
    "service logs --follow",
    "completion zsh",
    "help settings",
]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "store"
    monkeypatch.setenv("CAKEFS_STORE", str(path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return path


def modules_after(*arguments: str) -> set[str]:
    """What a fresh Python has imported after running the command."""
    code = "import sys; from cakefs.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def fail_with(error: BaseException) -> Callable[..., int]:
    def run(*_: object) -> int:
        raise error

    return run


def test_help_needs_nothing_heavy() -> None:
    assert not modules_after("--help") & HEAVY
    assert not modules_after("pull", "--help") & HEAVY


def test_listing_needs_nothing_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "format").write_text("cakefs-store 1\n")
    loaded = modules_after("--store", str(tmp_path / "store"), "ls")
    assert "lmdb" in loaded
    assert not loaded & {"trio", "httpx", "rich", "huggingface_hub", "pyfuse3"}


def test_a_plan_of_a_known_model_needs_nothing_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(single(llama(1)))
    at = ("--store", str(tmp_path / "store"))
    assert main([*at, "import", str(tmp_path / "mine"), "--as", "me/mine"]) == 0
    loaded = modules_after(*at, "plan", "me/mine")
    assert "cakefs.engine.known.preview" in loaded
    assert not loaded & {"trio", "httpx", "rich", "huggingface_hub", "pyfuse3", "numpy"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: cakefs {command} ")
    assert len(said.out.splitlines()) > 8
    assert said.err == ""


def test_help_lists_every_command_and_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(" {4}[a-z]", line)]
    assert [word for word in listed if word in COMMANDS] == list(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cakefs {__version__}\n"


@pytest.mark.parametrize("line", CONTRACT)
def test_contract_is_accepted(line: str) -> None:
    assert build_parser().parse_args(line.split()).command == line.split()[0]


@pytest.mark.parametrize(
    "line", ["", "frobnicate", "service", "service restart", "add", "show", "ls extra", "mount a b", "ls --js", "-x"]
)
def test_what_is_not_there_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == UserError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert [text.split()[0] for text in said.err.splitlines()] == ["error:", "hint:"]


@pytest.mark.parametrize("before", range(6))
def test_global_options_before_and_after_the_command(before: int) -> None:
    options = ["--store=S", "--endpoint=http://e", "--offline", "--quiet", "--debug"]
    args = build_parser().parse_args([*options[:before], "ls", *options[before:]])
    assert (args.store, args.endpoint, args.offline, args.quiet, args.debug) == ("S", "http://e", True, True, True)


def test_global_options_not_given() -> None:
    args = build_parser().parse_args(["ls"])
    assert (args.store, args.endpoint, args.offline, args.quiet, args.debug) == (None, None, None, False, False)


@pytest.mark.parametrize("kind", KINDS)
def test_error_ends_with_its_exit_code_and_no_traceback(
    kind: type[CakeError], store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gc, "run", fail_with(kind("the thing failed", hint="do this")))
    assert main(["gc", "--quiet"]) == kind.exit_code
    assert capsys.readouterr() == ("", "error: the thing failed\nhint: do this\n")


def test_error_from_a_group_of_tasks(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = ExceptionGroup("tasks", [ExceptionGroup("inner", [RemoteUnavailable("no answer")])])
    monkeypatch.setattr(gc, "run", fail_with(group))
    assert main(["gc"]) == RemoteUnavailable.exit_code
    assert capsys.readouterr().err == "error: no answer\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("tasks", [KeyboardInterrupt()])])
def test_ctrl_c_is_130_and_silent(
    error: BaseException, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gc, "run", fail_with(error))
    assert main(["gc"]) == 130
    assert capsys.readouterr() == ("", "")


def test_bug_is_one_line_and_a_traceback_with_debug(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gc, "run", fail_with(ZeroDivisionError("oops")))
    assert main(["gc"]) == 70
    brief = capsys.readouterr().err
    assert brief.splitlines()[0] == "error: internal error: ZeroDivisionError: oops"
    assert "--debug" in brief
    assert "Traceback" not in brief
    assert main(["gc", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says", "hint"),
    [
        (OSError(errno.EMFILE, "", "/some/file"), "Too many open files", "ulimit -n"),
        (
            ExceptionGroup("tasks", [CakeError("gone"), OSError(errno.ENOMEM, "")]),
            "Cannot allocate memory",
            "ulimit -v",
        ),
        (MemoryError(), "Cannot allocate memory", "ulimit -v"),
    ],
)
def test_what_the_system_runs_out_of_is_no_bug(
    error: Exception,
    says: str,
    hint: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gc, "run", fail_with(error))
    assert main(["gc"]) == CakeError.exit_code
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: {says}" and hint in said[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("add a//b", "a//b"),
        ("add org/name@", "org/name@"),
        ("add org/name@v1 --revision v2", "v2"),
        ("add org/name --as ../up", "../up"),
        ("add https://host/x.safetensors --revision v1", "revisions"),
        ("add https://", "not an http(s) URL"),
        ("add http://[::1/x.safetensors", "not a URL"),
        ("add http://xn--a/x.safetensors", "not a URL"),
        ("add http://host:99999/x.safetensors", "99999"),
        ("add https://host/dir/", "names no file"),
        ("add org/name --as=", "bad model name ''"),
        ("add org/name --revision=", "empty revision"),
        ("--endpoint nonsense add org/name", "nonsense"),
        ("pull org/name", "org/name"),
        ("show org/name", "no store"),
        ("rm org/name", "no store"),
        ("status --watch", "terminal"),
        ("umount /nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_user_mistake_is_exit_2_and_names_it(
    line: str, words: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == UserError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err.splitlines()[0]


@pytest.mark.parametrize("line", [["mount", ""], ["import", ""], ["export", "org/name", ""], ["add", "a", "--as", ""]])
def test_an_empty_argument_is_no_directory(line: list[str], store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == UserError.exit_code
    assert capsys.readouterr().err.startswith("error: an argument is empty\nhint: ")


def test_a_surplus_argument_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--nonsense", "x"]) == UserError.exit_code
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense x\nhint: cakefs ls --help\n"


def test_offline_nothing_can_be_added(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--offline", "add", "org/name"]) == RemoteUnavailable.exit_code
    assert capsys.readouterr().err.startswith("error: cannot add a model offline\nhint: ")


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    out = Out()
    out.line("café █")
    out.picture("██", "█")
    out.flush()
    assert stream.buffer.getvalue().decode("latin-1") == "café \\u2588\n\\u2588\\u2588\n"  # type: ignore[attr-defined]


def test_looking_makes_no_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert capsys.readouterr() == ("", "no models yet\nhint: cakefs add org/name\n")
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"]["models"] == 0
    assert not store.exists()


def test_newer_store_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.mkdir()
    (store / "format").write_text("cakefs-store 99\n")
    assert main(["ls"]) == UserError.exit_code
    assert "99" in capsys.readouterr().err


def test_doctor_reports_in_words_and_in_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--offline"])
    words = capsys.readouterr().out
    code = main(["doctor", "--offline", "--json"])
    checks = json.loads(capsys.readouterr().out)
    assert code == int(any(check["ok"] is False for check in checks))
    assert {"/dev/fuse", "store", "hub"} <= {check["name"] for check in checks}
    for name in (check["name"] for check in checks):
        assert f"{name}: " in words or name.startswith("mount "), "those of others come and go"


@pytest.mark.parametrize("arguments", ["completion zsh", "completion fish"])  # less than a buffer, and more
def test_stdout_that_cannot_be_written(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cakefs", *arguments.split()],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "error: cannot write to stdout: No space left on device\n")


def test_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cakefs", "completion", "fish"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_503_300_328, "1.50 GB"),
        (15 * 10**12, "15.0 TB"),
        (3 * 10**15, "3.00 PB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(size: int, text: str) -> None:
    assert human_size(size) == text


def test_counted() -> None:
    assert [counted(n, "file") for n in (0, 1, 2, 1234)] == ["0 files", "1 file", "2 files", "1,234 files"]


def test_what_upstream_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"
    out = Out()
    out.table(("NAME", ">SIZE"), [("x\x1b]0;t\x07", "1 B")])
    out.error("no \x1b[31mred", "h\n")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert said.err == "error: no \\x1b[31mred\nhint: h\\n\n"


def test_table_is_aligned_and_quiet_is_its_first_column(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "1 B", "x"), ("long/name", "12 kB", "")]
    Out().table(("NAME", ">SIZE", "STATE"), rows)
    assert capsys.readouterr().out == "NAME        SIZE  STATE\na            1 B  x\nlong/name  12 kB\n"
    Out(quiet=True).table(("NAME", ">SIZE", "STATE"), rows)
    assert capsys.readouterr().out == "a\nlong/name\n"
    Out().table(("NAME",), [])
    assert capsys.readouterr().out == ""


def test_a_log_line_waits_for_the_next_unless_somebody_is_kept_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LogLines(Out())

    def say(text: str, **marks: bool) -> str:
        lines.emit(logging.makeLogRecord({"msg": text, "levelname": "WARNING", **marks}))
        return capsys.readouterr().err

    assert say("bytes 0-9 of a file: busy") == ""
    assert say("trying again in 30 s: busy", at_once=True) == "warning: trying again in 30 s: busy\n"
    assert say("bytes 0-9 of a file: busy") + say("bytes 0-9 of a file: reset") == ""
    lines.settle("gave up: reset")
    assert capsys.readouterr().err == ""


def test_quiet_leaves_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    out = Out(quiet=True)
    out.note("n")
    out.hint("h")
    out.result("name", "added name")
    out.error("e")
    assert capsys.readouterr() == ("name\n", "error: e\n")
