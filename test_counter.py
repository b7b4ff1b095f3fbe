"""The counter's tests: a real Redis, which they kill, freeze and restart, and real servers."""

import http.client
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from webtest import TestApp

if not shutil.which("redis-server"):
    pytest.exit("no redis-server on the PATH: the tests start their own", returncode=1)

with socket.create_server(("localhost", 0)) as free:
    REDIS_PORT = free.getsockname()[1]
URL = f"redis://localhost:{REDIS_PORT}"
KEY = "visits-of-the-tests"
os.environ |= {"REDIS_URL": URL, "VISITS_KEY": KEY}

import counter  # after its settings, which it reads when it is imported

LIMIT = 3  # seconds in which every visit has its answer, whatever Redis does
VISIT = re.compile(r"Visit (\d+), served by (\S+)\n")


class RedisServer:
    """A redis-server with its data in `folder`, to be made to fail as real ones do."""

    def __init__(self, folder):
        self.folder = folder
        self.client = redis.Redis(port=REDIS_PORT)

    def start(self):
        options = f"--port {REDIS_PORT} --appendonly yes --appendfsync always".split()
        self.process = subprocess.Popen(
            ["redis-server", "--dir", self.folder, "--save", "", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert any(
            "Ready to accept connections" in line for line in self.process.stdout
        )

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)  # it may be frozen
        self.process.wait()
        self.process.stdout.close()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # back when it has stopped

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def count(self):
        return int(self.client.get(KEY) or 0)

    def commands(self):
        """Return how many INCRBY it has run."""
        return self.client.info("commandstats").get("cmdstat_incrby", {"calls": 0})[
            "calls"
        ]


class Relay(socketserver.ThreadingTCPServer):
    """Stands before Redis; holds each INCRBY until `go`, keeps its reply if `cut`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), self.Line)
        self.held, self.go, self.cut = threading.Semaphore(0), threading.Event(), False
        self.url = f"redis://localhost:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    class Line(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(("localhost", REDIS_PORT)) as upstream:
                while command := self.request.recv(4096):
                    if b"INCRBY" in command:
                        self.server.held.release()
                        self.server.go.wait(20)
                    upstream.sendall(command)
                    reply = upstream.recv(4096)
                    if b"INCRBY" in command and self.server.cut:
                        return
                    self.request.sendall(reply)


@pytest.fixture
def store(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture
def relay():
    with Relay() as relay:
        yield relay
        relay.go.set()
        relay.shutdown()


@pytest.fixture
def app(store, monkeypatch):
    """The WSGI callable in this process, held to the rules of WSGI by WebTest's lint."""
    monkeypatch.setattr(counter, "answered", 0.0)  # by the Redis of an earlier test
    return TestApp(counter.app)


@pytest.fixture
def serve(store):
    """Return a function that starts `python counter.py` and returns its process."""
    processes = []

    def start(**settings):
        process = subprocess.Popen(
            [sys.executable, "counter.py"],
            env=os.environ | {"PORT": "0"} | settings,  # 0: any port that is free
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        process.line = process.stdout.readline()
        process.port = int(re.search(r"port (\d+)", process.line)[1])
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def crowded(serve, relay):
    """A server that counts through the relay, with 1,200 connections open to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # and so the server's
    process = serve(REDIS_URL=relay.url)
    process.lines = [
        http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
        for _ in range(1200)
    ]
    for line in process.lines:
        line.connect()
    yield process
    for line in process.lines:
        line.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def get(port, path="/", host="127.0.0.1"):
    """Return the status and text that a request gets on a connection of its own."""
    connection = http.client.HTTPConnection(host, port, timeout=20)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def send(port, data):
    """Return all that a server answers to `data`, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(4096), b""))


def numbers(answers):
    return [int(VISIT.fullmatch(text)[1]) for status, text in answers if status == 200]


def assert_unavailable(answer):
    assert (
        answer.content_type == "text/plain" and int(answer.headers["Retry-After"]) > 0
    )
    assert re.fullmatch(r"Redis failed: [^\n]+\n", answer.text)


def test_a_visit_gets_the_next_number(app, store):
    for number in (1, 2, 3):
        answer = app.get("/")
        assert answer.text == f"Visit {number}, served by {socket.gethostname()}\n"
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert store.count() == 3


def test_head_has_the_headers_of_get(app, store):
    store.client.set(KEY, 8)
    for _ in ("9", "10"):  # a digit more is a byte more
        head = app.head("/")
        assert head.body == b"" and head.headers == app.get("/").headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(
            (method, "/", 405)
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
        ),
        *(
            ("GET", path, 404)
            for path in ("/favicon.ico", "/index.html", "/%2e", "/health/")
        ),
        ("POST", "/health", 405),
        ("POST", "/elsewhere", 404),
        *(
            (method, path, 200)
            for method in ("GET", "HEAD")
            for path in ("/health", "/ready")
        ),
        ("HEAD", "/", 200),
    ],
)
def test_nothing_but_a_get_of_the_root_counts(app, store, method, path, status):
    answer = app.request(path, method=method, status=status)
    assert (answer.headers.get("Allow") == "GET, HEAD") == (status == 405)
    assert store.count() == 0


def test_many_at_once_get_every_number_once(serve, store):
    process = serve()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(get, [process.port] * 2000))
    assert sorted(numbers(answers)) == list(range(1, 2001))
    assert store.count() == 2000
    process.kill()
    assert process.communicate()[1] == ""  # no warning of a queue, nor of anything else


@pytest.mark.parametrize(("lost", "status", "commands"), [(0, 200, 2), (1, 503, 1)])
def test_visits_that_wait_together_share_a_command_or_a_failure(
    app, store, relay, monkeypatch, lost, status, commands
):
    arrived = threading.Semaphore(0)

    class Waiting(deque):
        def append(self, visit):
            super().append(visit)
            arrived.release()

    monkeypatch.setattr(counter, "waiting", Waiting())
    monkeypatch.setattr(counter, "store", counter.connect(relay.url))
    with ThreadPoolExecutor(21) as pool:
        first = pool.submit(app.get, "/", status=status)
        assert relay.held.acquire(timeout=20)
        others = [
            pool.submit(TestApp(counter.app).get, "/", status=status) for _ in range(20)
        ]
        for _ in range(21):
            assert arrived.acquire(timeout=20)
        relay.cut = lost
        relay.go.set()
        answers = [visit.result() for visit in (first, *others)]
    given = numbers((answer.status_int, answer.text) for answer in answers)
    assert sorted(given) == ([] if lost else list(range(1, 22)))
    assert store.commands() == commands


@pytest.mark.parametrize("fail, mend", [("stop", "start"), ("freeze", "thaw")])
def test_without_redis_every_request_is_answered_and_all_is_well_once_it_is_back(
    app, store, fail, mend
):
    app.get("/")
    getattr(store, fail)()
    for path in ("/", "/", "/ready"):
        began = time.monotonic()
        assert_unavailable(app.get(path, status=503))
        assert time.monotonic() - began < LIMIT
    assert app.get("/health").text == "serving\n"
    getattr(store, mend)()
    assert app.get("/ready").text == "ready\n"
    before = store.count()
    assert numbers([(200, app.get("/").text)]) == [before + 1]
    assert before <= 3  # each of the two that failed was counted once at most


def test_a_redis_that_was_restarted_between_two_visits_costs_none(app, store):
    app.get("/")
    store.stop()
    store.start()
    assert numbers([(200, app.get("/").text)]) == [2]


def test_an_error_from_redis_is_told_and_nothing_counted(app, store):
    store.client.rpush(KEY, "no number")
    for method in ("GET", "HEAD"):
        answer = app.request("/", method=method, status=503)
        assert int(answer.headers["Retry-After"]) > 0
    assert_unavailable(app.get("/", status=503))
    store.client.set(KEY, "no number")
    assert "not an integer" in app.get("/", status=503).text
    app.head("/", status=503)
    store.client.delete(KEY)
    store.client.acl_setuser("default", commands=["-ping"])
    assert "no permissions" in app.get("/ready", status=503).text
    assert app.get("/health").status_int == 200
    store.client.acl_setuser("default", commands=["+ping"])
    assert app.get("/ready").status_int == 200
    assert numbers([(200, app.get("/").text)]) == [1]


def test_a_visit_whose_reply_is_lost_is_counted_once(app, store, relay, monkeypatch):
    monkeypatch.setattr(counter, "store", counter.connect(relay.url))
    relay.go.set()
    relay.cut = True
    assert_unavailable(app.get("/", status=503))
    assert store.count() == store.commands() == 1
    relay.cut = False
    assert numbers([(200, app.get("/").text)]) == [2]


def test_a_crowd_is_answered_in_time_though_redis_is_frozen(serve, store):
    process = serve()
    get(process.port)
    store.freeze()

    def visit(_):
        began = time.monotonic()
        return get(process.port), time.monotonic() - began

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(visit, range(200)))
    assert {status for (status, _), _ in answers} == {503}
    assert max(seconds for _, seconds in answers) < LIMIT
    store.thaw()
    assert get(process.port)[0] == 200


def test_a_killed_redis_repeats_no_number(serve, store):
    process = serve()
    answers, enough, done = [], threading.Semaphore(0), threading.Event()

    def visit(_):
        while not done.is_set():
            answers.append(get(process.port))
            enough.release()

    with ThreadPoolExecutor(16) as pool:
        visitors = [pool.submit(visit, n) for n in range(16)]
        for how in (signal.SIGKILL, signal.SIGTERM):
            for _ in range(300):
                assert enough.acquire(timeout=20)
            store.stop(how)
            store.start()
        for _ in range(300):
            assert enough.acquire(timeout=20)
        done.set()
        for visitor in visitors:
            visitor.result()
    assert {status for status, _ in answers} <= {200, 503}
    assert max(Counter(numbers(answers)).values()) == 1
    assert store.count() >= max(numbers(answers))


@pytest.mark.parametrize("host", ["127.0.0.1"] + ["::1"] * socket.has_dualstack_ipv6())
def test_it_serves_on_every_interface(serve, host):
    assert get(serve().port, host=host)[0] == 200


def test_it_says_where_it_listens_and_counts_but_no_password(serve):
    secret = URL.replace("//", "//user:s3cret@") + "?password=s3cret"
    process = serve(REDIS_URL=secret)
    assert f"port {process.port}, counting {KEY} in Redis" in process.line
    assert f"'port': {REDIS_PORT}" in process.line
    assert "s3cret" not in process.line


def test_it_keeps_to_one_core_where_the_system_allows(serve):
    if hasattr(os, "sched_getaffinity"):  # a Mac has none
        assert len(os.sched_getaffinity(serve().pid)) == 1


def test_it_names_no_product(serve):
    port = serve().port
    for request in (b"GET / HTTP/1.0\r\n\r\n", b"?\r\n\r\n"):
        assert b"waitress" not in send(port, request).lower()


def test_more_than_a_thousand_visitors_can_stay_connected(crowded):
    for line in crowded.lines:
        line.request("GET", "/health")
    assert {line.getresponse().status for line in crowded.lines} == {200}


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"
        + b"\x00" * 154,  # TLS to a plain port
        b"\r\n\x00\xff\xfe GET / \r\n\r\n",
        b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET // HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%2F?/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /#/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n",  # half a request
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhalf",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 700000\r\n\r\n" + b"x" * 700000,
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 300000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_visit_is_refused_and_not_counted(serve, store, request_bytes):
    process = serve()
    try:
        answer = send(process.port, request_bytes)
    except ConnectionError:
        answer = b""
    assert re.match(rb"HTTP/1\.[01] (4\d\d|501) |$", answer)
    assert store.count() == 0
    assert numbers([get(process.port)]) == [1]


def test_sigterm_waits_for_the_visit_in_flight(serve, store, relay):
    process = serve(REDIS_URL=relay.url)
    with ThreadPoolExecutor(1) as pool:
        visit = pool.submit(get, process.port)
        assert relay.held.acquire(timeout=20)
        process.terminate()
        began = time.monotonic()
        while get(process.port, "/ready")[0] == 200:
            pass  # the signal is on its way
        assert get(process.port, "/ready") == (404, "stopping\n")
        assert get(process.port, "/health") == (200, "serving\n")
        relay.go.set()
        assert numbers([visit.result()]) == [1]
        assert numbers([get(process.port)]) == [2]
        assert process.wait(20) == 0
    assert time.monotonic() - began < LIMIT
    assert process.communicate() == ("", "")


def test_the_end_waits_until_the_last_answer_is_sent(crowded, relay):
    with ThreadPoolExecutor(1) as pool:
        visit = pool.submit(get, crowded.port)
        assert relay.held.acquire(timeout=20)
        # The main loop looks at all connections before it sends: too late for a hasty end.
        get(crowded.port, "/health")
        crowded.send_signal(signal.SIGINT)
        relay.go.set()
        assert numbers([visit.result()]) == [1]
    assert crowded.wait(20) == 0


def test_ctrl_c_ends_it_at_once_and_in_peace(serve):
    process = serve()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert process.communicate() == ("", "")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("REDIS_URL", "nonsense"),
        ("REDIS_URL", ""),
        ("REDIS_URL", "http://localhost"),
        ("REDIS_URL", "redis://localhost:port"),
        ("REDIS_URL", "redis://localhost:70000"),
        ("REDIS_URL", "redis://no..host"),
        ("REDIS_URL", "redis://localhost?tiemout=1"),
        ("REDIS_URL", "redis://:s3c/ret@localhost"),
        ("PORT", "five thousand"),
        ("PORT", "70000"),
        ("PORT", str(REDIS_PORT)),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start(store, setting, value):
    settings = os.environ | {"PORT": "0", setting: value}
    command = [sys.executable, "counter.py"]
    ended = subprocess.run(
        command, check=False, env=settings, capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stdout == ""
    assert re.fullmatch(rf"counter: {setting} [^\n]+\n", ended.stderr)
    assert "s3c" not in ended.stderr
