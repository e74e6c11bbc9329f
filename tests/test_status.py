"""The counters of a mount: their names, status.json, Prometheus text, what is counted beside it, and the live view."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cakefs.cli.watch import frame
from cakefs.engine.serve.metrics import COUNTER, GAUGE, KEYS, render
from cakefs.engine.serve.scrape import check_address, exporting
from cakefs.engine.serve.sizes import Counting, count
from cakefs.errors import CakeError, UserError
from tests.fs_child import eventually
from tests.hub import Hub
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse

ROOT = Path(__file__).parents[1]
METRIC = re.compile(r'^(?:# (?:HELP|TYPE) (\w+) .+|(\w+)(\{model="(?:[^"\\]|\\.)*"\})? -?\d+(\.\d+)?(e-?\d+)?)$')


def flat(status: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in status.items():
        found |= flat(value, f"{key}.") if key == "mount" else {prefix + key}
    return found


@pytest.fixture(scope="module")
def cakefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cakefs]:
    """Two models of the same bytes, all local."""
    data = single({"a": tensor(1, 300, 1000), "b": tensor(2, 300, 1000)})
    with Hub() as hub:
        for name in ("org/one", "org/two"):
            hub.add_repo(name, {"config.json": CONFIG, "model.safetensors": data})
        made = Cakefs(tmp_path_factory.mktemp("status"), hub.endpoint)
        made.add_all(["org/one", "org/two"])
        made.run("pull", "org/one")
        yield made


@needs_fuse
def test_each_key_of_a_mount_is_documented_and_the_other_way_round(cakefs: Cakefs, tmp_path: Path) -> None:
    sock = tmp_path / "metrics"
    with cakefs.mounted("--metrics", f"unix:{sock}") as mount:
        first = cakefs.status()
        counted = {first[key] is not None for key in ("sizes_as_of", "stored_bytes", "saved_bytes")}
        assert len(counted) == 1, "nothing is 0 that was not counted yet"
        (mount / "org/one/model.safetensors").read_bytes()
        assert eventually(lambda: cakefs.status()["sizes_as_of"] is not None)
        status = cakefs.status()
        assert flat(status) == set(KEYS)
        assert status["per_model"].keys() == {"org/one", "org/two"}
        one = status["per_model"]["org/one"]
        assert one["size"] == one["local_bytes"] and one["state"] == "verified"
        assert status["saved_bytes"] >= 2_000_000, "the second model has the same tensors"
        assert status["hit_rate"] is not None and 0 <= status["hit_rate"] <= 1
        assert status["served_per_s"] > 0
        assert (status["mount"]["waiting"], status["mount"]["stalled"]) == (0, 0)

        assert stat.S_IMODE(sock.stat().st_mode) == 0o600
        text = scrape(str(sock))
        assert all(METRIC.match(line) for line in text.splitlines()), text
        assert f'cakefs_model_size{{model="org/one"}} {one["size"]}\n' in text
        assert "hf_" not in text and "http" not in text
        names = {m[1] for line in text.splitlines() if (m := re.match(r"# TYPE (\w+)", line))}
        numbers = {key: kind for key, (kind, _) in KEYS.items() if kind in (GAUGE, COUNTER)}
        assert names == {
            f"cakefs_{key.replace('.', '_')}{'_total' * (kind == COUNTER)}" for key, kind in numbers.items()
        } | {"cakefs_model_size", "cakefs_model_local_bytes"}
    assert not sock.exists()


def scrape(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"text/plain; version=0.0.4" in head
    return body.decode()


@needs_fuse
def test_metrics_that_cannot_be_served_leave_nothing_mounted(cakefs: Cakefs) -> None:
    for address in ("0.0.0.0:9400", "unix:/nowhere/at/all/socket"):
        done = cakefs.run("mount", "--metrics", address, str(cakefs.mountpoint), check=False)
        assert done.returncode in (1, 2) and address in done.stderr
        assert not os.path.ismount(cakefs.mountpoint)


@pytest.mark.parametrize("address", ["unix:/a/b", "127.0.0.1:0", "127.3.2.1:9400", "localhost:80", "[::1]:9400"])
def test_places_of_this_machine_are_accepted(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "9400", ":9400", "192.168.1.1:1", "unix:relative", "[::]:1", "h:1", "127.0.0.1:65536", "::1"],
)
def test_places_that_others_reach_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="metrics are not served at"):
        check_address(address)


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_scraper_of_this_machine_is_answered_and_a_strange_page_is_not() -> None:
    async def main() -> list[tuple[int, str]]:
        async with exporting("127.0.0.1:0", lambda: {"models": 1}) as exporter:
            exporter.use(lambda: {"models": 2})
            base = exporter.place.removesuffix("/metrics")
            asked = [
                (exporter.place, {}),
                (base + "/secret", {}),
                (exporter.place, {"Host": "evil.example:9400"}),
                (exporter.place, {"Host": "localhost:9400"}),
            ]
            return [await trio.to_thread.run_sync(lambda u=u, h=h: get(u, **h)) for u, h in asked]  # type: ignore[misc]

    found = trio.run(main)
    assert [code for code, _ in found] == [200, 404, 403, 200]
    assert found[0][1] == "# HELP cakefs_models names in the store\n# TYPE cakefs_models gauge\ncakefs_models 2\n"


@pytest.mark.parametrize(
    "said", [b"\r\n\r\n", b"x\r\n\r\n", b"GET\r\n\r\n", b"\xff \x00 \xff\r\n\r\n", b"GET / HTTP/1.1"]
)
def test_a_scraper_that_speaks_no_http_ends_nothing(said: bytes) -> None:
    async def main() -> tuple[bytes, int]:
        async with exporting("127.0.0.1:0", dict) as exporter:
            async with await trio.open_tcp_stream("127.0.0.1", int(exporter.place.split(":")[2].split("/")[0])) as odd:
                await odd.send_all(said)
                await odd.send_eof()
                answer = await odd.receive_some()
            return bytes(answer), (await trio.to_thread.run_sync(lambda: get(exporter.place)))[0]

    answer, code = trio.run(main)
    assert answer.partition(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"") and code == 200


def test_on_a_unix_socket_any_name_of_the_host_will_do(tmp_path: Path) -> None:
    """No web page gets there, and scrapers name it as they like."""

    async def main() -> bytes:
        async with exporting(f"unix:{tmp_path}/s", dict), await trio.open_unix_socket(tmp_path / "s") as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: cakefs\r\n\r\n")
            return bytes(await stream.receive_some())

    assert trio.run(main).startswith(b"HTTP/1.1 200 OK")


def test_a_scraper_that_says_nothing_or_too_much_holds_up_nobody() -> None:
    async def main() -> str:
        async with exporting("127.0.0.1:0", dict) as exporter:
            port = int(exporter.place.split(":")[2].partition("/")[0])
            silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
            noisy = await trio.open_tcp_stream("127.0.0.1", port)
            with contextlib.suppress(trio.BrokenResourceError):
                await noisy.send_all(b"x" * 100_000)
            code, _ = await trio.to_thread.run_sync(lambda: get(exporter.place))
            for stream in (*silent, noisy):
                await stream.aclose()
            return str(code)

    assert trio.run(main) == "200"


def test_a_socket_that_was_left_behind_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def main() -> None:
        async with exporting(f"unix:{path}", dict):
            with pytest.raises(CakeError, match="Address already in use"):
                async with exporting(f"unix:{path}", dict):
                    pass

    trio.run(main)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(CakeError):
        trio.run(main)
    assert path.read_text() == "mine"


def test_names_are_escaped_for_prometheus() -> None:
    text = render({"per_model": {'a"b\\c\nd': {"size": 1, "local_bytes": 0, "state": "0 %"}}})
    assert 'cakefs_model_size{model="a\\"b\\\\c\\nd"} 1\n' in text
    assert render({"hit_rate": None, "pid": 5}) == "\n"


def test_the_store_is_counted_by_a_child_only_while_somebody_looks(cakefs: Cakefs) -> None:
    expected = count(cakefs.store)
    assert expected.saved_bytes > 2_000_000 and expected.stored_bytes > 2_400_000

    async def main() -> None:
        counting = Counting(cakefs.store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counting.run)
            assert counting.latest() is None
            with trio.fail_after(60):
                while (found := counting.latest()) is None:  # noqa: ASYNC110  it has no event for this
                    await trio.sleep(0.05)
            assert found._replace(as_of=0) == expected._replace(as_of=0)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_store_that_cannot_be_counted_is_said_and_the_last_count_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "format").write_text("cakefs-store 99\n")

    async def main() -> None:
        counting = Counting(tmp_path)
        counting.latest()
        with trio.move_on_after(60) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(counting.run)
                while not caplog.records:  # noqa: ASYNC110
                    await trio.sleep(0.05)
                scope.cancel()
        assert counting.latest() is None

    trio.run(main)
    assert "cannot count what is local" in caplog.text and "99" in caplog.text


def picture(
    models: dict[str, tuple[int, int]], grown: dict[str, float], height: int = 10, width: int = 80
) -> list[str]:
    per_model = {n: {"size": s, "local_bytes": b, "state": f"{100 * b // s} %"} for n, (b, s) in models.items()}
    store = {
        "path": "/s",
        "models": 1,
        "blobs": 1,
        "blob_bytes": 1,
        "partial_bytes": 0,
        "borrowed_bytes": 0,
        "limit": 0,
    }
    status = {"store": {**store, "saved_bytes": 0, "per_model": per_model}, "mounts": []}
    return frame(status, grown, 100.0, width, height)


def test_the_live_view_shows_what_grows_first_and_fits_the_terminal() -> None:
    models = {f"org/m{i}": (0, 1000) for i in range(50)} | {"org/z": (500, 1000), "org/y": (250, 1000)}
    lines = picture(models, {"org/z": 99.0, "org/m1": 10.0}, height=12)
    assert len(lines) <= 11 and all(len(line) < 80 for line in lines)
    names = [line.split()[0] for line in lines if line.startswith("org/")]
    assert names[:3] == ["org/z", "org/y", "org/m0"]
    assert "━━━━━━━━━━··········" in lines[lines.index("") + 1]
    assert lines[-1] == f"and {52 - len(names)} more"
    assert all(len(line) < 30 for line in picture({"a" * 200: (1, 2)}, {}, width=30))
    assert len(picture(models, {}, height=3)) == 2


def test_status_in_words_and_json(cakefs: Cakefs) -> None:
    said = cakefs.run("status").stdout
    assert "2 models, 2 of them complete" in said and "plain copies would take" in said
    store = json.loads(cakefs.run("status", "--json").stdout)["store"]
    assert store["per_model"]["org/two"]["local_bytes"] == store["per_model"]["org/one"]["local_bytes"]
    assert store["saved_bytes"] > 2_000_000


def test_the_live_view_repaints_in_place_and_ends_with_ctrl_c(cakefs: Cakefs) -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in cakefs.environment.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "cakefs", "status", "--watch"]
    process = subprocess.Popen(command, env=environment, stdout=terminal, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(terminal)
    painted = b""
    with process, os.fdopen(main, "rb", buffering=0) as screen:
        try:
            while painted.count(b"models, ") < 2:
                painted += screen.read(65536)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while piece := screen.read(65536):
                    painted += piece
            assert process.stderr is not None and process.stderr.read() == b""
        finally:
            process.kill()
    assert process.returncode == 0
    assert b"\x1b[2J" not in painted, "it paints over, it does not clear the screen"
    assert painted.rfind(b"\x1b[?25h") > painted.rfind(b"\x1b[?25l"), "the cursor is back"
