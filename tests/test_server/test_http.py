# SPDX-License-Identifier: Apache-2.0
"""The HTTP server over real sockets, with a small app in vLLM's place: clients that are slow, vanish or ask too late."""

import contextlib
import http.client
import json
import logging
import re
import socket
import time

import pytest
from prometheus_client import REGISTRY

from server.http import LoadingServer
from server.listen import bind
from server.settings import Settings
from server.state import Phase, ServerState
from tests.test_server.small_server import CHUNK, read_all, status_and_code


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", 408, "slow_head"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345", 408, "slow_body"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n", 408, "slow_body"),
    ],
)
def test_a_request_that_does_not_arrive_is_closed(start, sent, status, code):
    server = start(header_timeout_s=0.3, body_timeout_s=0.3)
    with server.connect() as connection:
        connection.sendall(sent)
        started = time.monotonic()
        assert status_and_code(read_all(connection)) == (status, code)
        assert 0.2 < time.monotonic() - started < 3


def test_bytes_that_trickle_in_do_not_keep_a_connection(start):
    server = start(header_timeout_s=0.5)
    with server.connect() as connection:
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in b"GET / HTTP/1.1\r\nX-Slow: " + b"a" * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - started < 3


def test_a_silent_connection_is_closed_without_a_word(start):
    server = start(header_timeout_s=0.3)
    with server.connect() as connection:
        assert read_all(connection) == b""


def test_a_second_slow_head_on_a_connection_is_closed_too(start):
    server = start(header_timeout_s=0.3)
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHos")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200") and b"slow_head" in answer


def test_an_idle_connection_is_kept_and_then_closed(start):
    server = start(header_timeout_s=0.2, keep_alive_timeout_s=1)
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.6)  # longer than a head may take: idle is not slow
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(connection).count(b"HTTP/1.1 200") == 2


def test_an_answer_that_takes_long_is_not_cut_off(start):
    server = start(header_timeout_s=0.2, body_timeout_s=0.2, write_timeout_s=0.2, keep_alive_timeout_s=1)
    with server.connect() as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1)
        server.app.go.set()
        assert b"last" in read_all(connection)


def test_a_head_without_end_is_refused(start):
    server = start()
    with server.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(
                b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 900) for i in range(80))
            )
        assert status_and_code(read_all(connection)) == (431, "head_too_large")


def test_one_connection_too_many_is_told_so(start):
    server = start(max_connections=2)
    with server.connect(), server.connect(), server.connect() as third:
        answer = read_all(third)
        assert status_and_code(answer) == (503, "too_many") and b"\r\nretry-after: 1\r\n" in answer


@pytest.mark.parametrize(
    ("sent", "status", "reason", "own_id"),
    [
        (b"", 503, "too_many", None),
        (b"GET / HTTP/1.1\r\nX-A: ", 408, "slow_head", None),
        (b"GET / HTTP/1.1\r\nX-A: " + b"a" * 70_000, 431, "head_too_large", None),
        (b"POST / HTTP/1.1\r\nX-Request-Id: mine\r\nContent-Length: 5\r\n\r\n1", 408, "slow_body", "mine"),
    ],
)
def test_a_refused_connection_has_an_id_and_a_line(start, caplog, sent, status, reason, own_id):
    server = start(max_connections=1, header_timeout_s=0.3, body_timeout_s=0.3)
    with caplog.at_level(logging.INFO, logger="pvq.access"), contextlib.ExitStack() as stack:
        connection = stack.enter_context(server.connect())
        if reason == "too_many":
            connection = stack.enter_context(server.connect())
        connection.sendall(sent)
        answer = read_all(connection)
    (line,) = [line for line in caplog.records if "reason" in line.facts]
    request_id = re.search(rb"\r\nx-request-id: (\S+)\r\n", answer)[1].decode()
    assert len(request_id) == 32 if own_id is None else request_id == own_id
    assert status_and_code(answer) == (status, reason)
    assert line.facts == {"request_id": request_id, "client": "127.0.0.1", "status": status, "reason": reason}
    assert line.getMessage() == f"127.0.0.1 {status} {reason} id={request_id}"


def test_a_late_body_is_one_line_and_no_client_that_left(start, caplog):
    def count(name, **labels):
        return REGISTRY.get_sample_value(f"pvq_server_{name}_total", labels) or 0

    labels = {"method": "POST", "route": "other", "status": "408"}
    before, left = count("requests", **labels), count("disconnected")
    server = start(body_timeout_s=0.3)
    with caplog.at_level(logging.INFO, logger="pvq.access"), server.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n1")
        assert status_and_code(read_all(connection)) == (408, "slow_body")
        deadline = time.monotonic() + 10
        while count("requests", **labels) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert count("requests", **labels) == before + 1 and count("disconnected") == left
        server.stop()  # what would come late has come then
    assert len(caplog.records) == 1


def test_no_line_for_a_refused_connection_without_the_access_log(start, caplog):
    server = start(header_timeout_s=0.3, access_log=False)
    with caplog.at_level(logging.INFO, logger="pvq.access"), server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        assert status_and_code(read_all(connection)) == (408, "slow_head")
    assert caplog.records == []


def test_a_client_that_does_not_read_is_dropped_and_its_request_ends(start):
    server = start(write_timeout_s=0.5)
    with server.connect() as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server.app.ended.wait(10), "the request still runs"
    for _ in range(100):
        if server.state.running == 0:
            break
        time.sleep(0.01)
    assert server.state.running == 0


def test_a_client_that_reads_slowly_enough_to_matter_is_dropped(start):
    server = start(write_timeout_s=0.5)
    with server.connect() as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        end = time.monotonic() + 10
        while not server.app.ended.is_set() and time.monotonic() < end:
            connection.recv(10)
            time.sleep(0.05)
        assert server.app.ended.is_set()


def test_a_client_that_reads_well_is_not_dropped(start):
    server = start(write_timeout_s=0.3)
    with server.connect() as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        end, received = time.monotonic() + 1.5, 0
        while time.monotonic() < end:
            received += len(connection.recv(1 << 20))
        assert received > 10 * len(CHUNK) and not server.app.ended.is_set()
    assert server.app.ended.wait(5)


def test_a_client_that_leaves_frees_its_place(start):
    server = start()
    connection = server.connect()
    connection.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.recv(100)
    connection.close()
    assert server.app.ended.wait(5)


def test_draining_ends_streams_and_refuses_the_rest(start):
    server = start()
    stream = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    stream.request("GET", "/wait")
    answer = stream.getresponse()
    assert answer.readline() == b"first\n"
    idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    idle.request("GET", "/")
    idle.getresponse().read()
    server.loop.call_soon_threadsafe(server.drain.start)
    while server.state.phase is not Phase.DRAINING:
        time.sleep(0.01)
    fresh = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for connection in (idle, fresh):  # one was open before, one comes now
        connection.request("POST", "/v1/completions", body=b"{}")
        refused = connection.getresponse()
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert json.loads(refused.read())["error"]["code"] == "server_draining"
    probe = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    probe.request("GET", "/ready")
    assert probe.getresponse().status == 503
    server.app.go.set()
    assert answer.read() == b"last\n"
    server.thread.join(5)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("calls", [1, 2])
def test_draining_ends_in_time_or_at_once_when_asked_twice(start, calls):
    server = start(drain_timeout_s=1 if calls == 1 else 60)
    with server.connect() as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1000)
        started = time.monotonic()
        for _ in range(calls):
            server.loop.call_soon_threadsafe(server.drain.start)
        server.thread.join(10)
        assert not server.thread.is_alive() and time.monotonic() - started < 8


@pytest.mark.parametrize("draining", [False, True])
def test_a_dead_engine_gives_clients_a_moment_and_ends_a_drain_too(start, draining):
    server = start(drain_timeout_s=60)
    with server.connect() as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1000)
        if draining:
            server.loop.call_soon_threadsafe(server.drain.start)
        server.loop.call_soon_threadsafe(server.drain.fail, 1.0)
        while server.state.phase is not Phase.FAILED:
            time.sleep(0.01)
        assert server.state.told_to_end is draining  # then it must not be restarted
        assert not server.server.should_exit
        server.app.go.set()  # the request ends with its error
        assert read_all(connection).endswith(b"last\n\r\n0\r\n\r\n")
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_the_port_answers_while_the_model_loads_and_passes_to_the_server_that_follows():
    state, settings = ServerState(), Settings()
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    loading = LoadingServer(settings, state, listener)
    loading.start()

    def get(path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            get("/health")
            break
        time.sleep(0.05)
    assert get("/health") == (200, b"")
    assert get("/ready")[0] == get("/v1/models")[0] == get("/")[0] == 503
    loading.stop()
    waiting = socket.create_connection(("127.0.0.1", port), timeout=5)  # between the two servers: not refused
    waiting.close()
    listener.close()


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2_3:4", True), ("x" * 129, False), ("a b", False), ("", False)]
)
def test_a_request_has_one_id_everywhere(start, caplog, given, kept):
    server = start()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with caplog.at_level(logging.INFO, logger="pvq.access"):
        connection.request("GET", "/x", headers={"X-Request-Id": given})
        answer = connection.getresponse()
        answer.read()
        for _ in range(100):
            if caplog.records:
                break
            time.sleep(0.01)
    request_id = answer.headers["x-request-id"]
    assert (request_id == given) is kept and len(request_id) <= 128
    assert server.app.headers[-1][b"x-request-id"].decode() == request_id
    assert caplog.records[-1].facts["request_id"] == request_id
    assert caplog.records[-1].facts["status"] == 200


def test_a_request_that_is_cut_off_before_its_answer_is_told_so(start):
    server = start(drain_timeout_s=0)
    with server.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12")  # never complete
        while not server.state.running:
            time.sleep(0.01)
        server.loop.call_soon_threadsafe(server.drain.start)
        assert status_and_code(read_all(connection)) == (503, "server_ended")


@pytest.mark.parametrize(
    ("head", "status", "complete"),
    [(b"GET /wait", 200, False), (b"POST /", 503, True), (b"GET /flood", 200, False)],
)
def test_only_a_client_that_left_is_called_so(start, caplog, monkeypatch, head, status, complete):
    monkeypatch.setattr("server.http._CUT_TIMEOUT_S", 1)
    server = start(drain_timeout_s=0)
    leaves = head == b"GET /flood"
    before = REGISTRY.get_sample_value("pvq_server_disconnected_total")
    with caplog.at_level(logging.INFO, logger="pvq.access"):
        with server.connect() as connection:
            length = b"Content-Length: 5\r\n" if status == 503 else b""
            connection.sendall(head + b" HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n")
            while not server.state.running:
                time.sleep(0.01)
            if leaves:
                connection.recv(1000)
            else:
                server.loop.call_soon_threadsafe(server.drain.start)
                read_all(connection)
        for _ in range(300):
            if lines := [line for line in caplog.records if line.name == "pvq.access"]:
                break
            time.sleep(0.01)
    (line,) = lines
    assert (line.facts["status"], line.facts["complete"]) == (status, complete)
    assert line.getMessage().endswith(" (client left)" if leaves else " (server ended)")
    assert REGISTRY.get_sample_value("pvq_server_disconnected_total") - before == leaves
