"""Every fault of the test hub must be what it claims to be."""

import http.client
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub import Hub
from tests.hub.ask import Reply, ask

WEIGHTS = os.urandom(300_000)
URL = "/org/name/resolve/main/model.safetensors"
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_status_faults(hub: Hub, status: int) -> None:
    hub.add_repo("org/name", FILES)
    fault = hub.fault(status, "*.safetensors", times=2, retry_after=3, headers={"X-Error-Code": "Why"})
    url = hub.endpoint + URL
    replies = [ask(url, "HEAD") for _ in range(3)]
    assert [r.status for r in replies] == [status, status, 302] and fault.hits == 2
    assert (replies[0].headers["Retry-After"], replies[0].headers["X-Error-Code"]) == ("3", "Why")
    hub.fault(status, stage="api")
    assert [ask(hub.endpoint + "/api/models/org/name").status for _ in range(2)] == [status, 200]


def test_faults_of_answers(hub: Hub) -> None:
    url = hub.plain("d/f", WEIGHTS)

    def spoiled(kind: str, **options: Any) -> Reply:
        hub.fault(kind, "d/*", **options)
        return ask(url, Range="bytes=10-19")

    assert spoiled("short").body == WEIGHTS[10:19]
    assert spoiled("short", after=3).body == WEIGHTS[10:13]
    assert spoiled("long", by=2).body == WEIGHTS[10:20] + b"\0\0"
    assert spoiled("corrupt", after=2).body == WEIGHTS[10:12] + bytes([WEIGHTS[12] ^ 0xFF]) + WEIGHTS[13:20]
    assert spoiled("corrupt", position=19).body == WEIGHTS[10:19] + bytes([WEIGHTS[19] ^ 0xFF])
    moved = spoiled("wrong-range")
    assert (moved.headers["Content-Range"], moved.body) == ("bytes 11-20/300000", WEIGHTS[11:21])
    ignored = spoiled("no-range")
    assert (ignored.status, ignored.headers["Content-Range"], ignored.body) == (200, None, WEIGHTS)
    assert spoiled("etag").headers["ETag"] != ask(url).headers["ETag"]
    assert spoiled("416").headers["Content-Range"] == "bytes */300000"
    assert spoiled("redirect", to="http://example/").headers["Location"] == "http://example/"
    assert spoiled("slow", rate=1e6).body == WEIGHTS[10:20]
    assert ask(url, Range="bytes=10-19").body == WEIGHTS[10:20]
    hub.fault("gzip")
    assert ask(url, Accept_Encoding="gzip").headers["Content-Encoding"] == "gzip"


def test_a_fault_waits_for_an_answer_that_it_fits(hub: Hub) -> None:
    url = hub.plain("f", WEIGHTS)
    fault = hub.fault("corrupt", position=200_000)
    assert ask(url, Range="bytes=0-199999").body == WEIGHTS[:200_000] and fault.hits == 0
    assert ask(url, "HEAD").status == 200 and fault.hits == 0
    assert ask(url, Range="bytes=150000-249999").body != WEIGHTS[150_000:250_000] and fault.hits == 1
    with pytest.raises(ValueError, match="no such fault: drpo"):
        hub.fault("drpo")
    hub.fault("500", times=None)
    hub.clear_faults()
    assert ask(url).body == WEIGHTS


def test_expired_link(hub: Hub) -> None:
    hub.add_repo("org/name", FILES)
    hub.fault("expired")
    url = ask(hub.endpoint + URL, "HEAD").headers["Location"]
    assert [ask(url).status for _ in range(2)] == [403, 200]


def test_redirects_without_end(hub: Hub) -> None:
    hub.add_repo("org/name", FILES)
    hub.fault("redirect-loop")
    url = hub.endpoint + URL
    seen = set()
    for _ in range(10):
        reply = ask(url)
        assert reply.status == 302 and url not in seen
        seen.add(url)
        url = hub.endpoint + reply.headers["Location"]


@pytest.mark.parametrize(("kind", "error"), [("drop", http.client.IncompleteRead), ("reset", ConnectionResetError)])
def test_connections_break(hub: Hub, kind: str, error: type[Exception]) -> None:
    url = hub.plain("f", WEIGHTS)
    hub.fault(kind, after=100_000)
    with pytest.raises(error):
        ask(url)
    hub.fault(kind)
    with pytest.raises(ConnectionError):  # before the head
        ask(url)
    hub.fault(kind, head=True)
    with pytest.raises(error):
        ask(url)
    assert [r.sent for r in hub.requests][1:] == [0, 0] and hub.requests[0].sent <= 100_000
    assert ask(url).body == WEIGHTS


def test_a_stall_ends_when_released(hub: Hub) -> None:
    url = urlsplit(hub.plain("f", WEIGHTS))
    fault = hub.fault("stall", after=1000)
    connection = http.client.HTTPConnection(url.netloc, timeout=20)
    connection.request("GET", url.path)
    response = connection.getresponse()
    assert response.read(1000) == WEIGHTS[:1000] and hub.requests[0].sent == 1000
    assert hub.wait_for("f", stage="plain")[0].sent == 1000
    fault.release()
    assert response.read() == WEIGHTS[1000:]
    connection.close()
    hub.fault("stall", seconds=0.05)
    assert ask(url.geturl()).body == WEIGHTS


def test_a_stall_ends_with_its_client(hub: Hub) -> None:
    url = urlsplit(hub.plain("f", WEIGHTS))
    hub.fault("stall", times=None)
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(f"GET {url.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        hub.wait_for("f")
        with pytest.raises(TimeoutError):
            hub.wait_for("f", count=2, timeout=0.01)
    hub.down()
