"""A download from a host out of reach ends soon, with the cause first."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lingua.errors import UserError
from lingua.prepare import network
from lingua.prepare.network import call_online, find_obstacle

URL = "https://host.example/path"
NEVER = threading.Event()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(network, "CONNECT_LIMIT", 0.3)
    monkeypatch.setattr(network, "CACHE_LIMIT", 0.15)


def fail() -> None:
    raise ConnectionError("the library's own words")


def answer_after(seconds: float) -> str:
    time.sleep(seconds)
    return "answer"


@pytest.mark.parametrize("call", [fail, NEVER.wait], ids=["fails", "retries forever"])
@pytest.mark.parametrize(
    "obstacle, cause",
    [
        (lambda url: "Name or service not known", "Name or service"),
        (lambda url: NEVER.wait(), "no answer in"),
    ],
    ids=["known", "no answer"],
)
def test_without_a_connection_the_cause_comes_first(monkeypatch, call, obstacle, cause):
    monkeypatch.setattr(network, "find_obstacle", obstacle)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"^no connection to host\.example \({cause}.*the file"):
        call_online(call, URL, "the file")
    assert time.monotonic() - started < 3


def test_a_call_that_needs_no_network_succeeds_without_one(monkeypatch):
    monkeypatch.setattr(network, "find_obstacle", lambda url: "Name or service not known")
    assert call_online(lambda: answer_after(0.05), URL, "the file") == "answer"


def test_with_a_connection_the_call_decides(monkeypatch):
    monkeypatch.setattr(network, "find_obstacle", lambda url: None)
    assert call_online(lambda: answer_after(0.5), URL, "the file") == "answer"
    with pytest.raises(ConnectionError, match="own words"):
        call_online(fail, URL, "the file")


@contextmanager
def server(reply: bytes | None) -> Iterator[int]:
    """Answer one connection, or none, at a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(reply or b"")
            connection.close()

        if reply is not None:
            threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    "scheme, reply, obstacle",
    [
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None),
        ("http", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", None),
        ("https", b"this is not TLS", None),  # certificates are the library's to judge
        ("http", None, "timed out"),
    ],
)
def test_any_answer_shows_that_the_host_is_in_reach(monkeypatch, scheme, reply, obstacle):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(reply) as port:
        assert find_obstacle(f"{scheme}://127.0.0.1:{port}") == obstacle


def test_a_closed_port_is_out_of_reach(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server(None) as port:
        pass
    assert "refused" in str(find_obstacle(f"http://127.0.0.1:{port}"))
    assert "unknown url type" in str(find_obstacle("no url"))
