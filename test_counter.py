"""The counter's tests, with a real Redis, which they kill and freeze, and real servers."""

import contextlib
import http.client
import itertools
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from webtest import TestApp

if not shutil.which("redis-server"):
    pytest.exit("no redis-server on the PATH: the tests start their own", returncode=1)

with socket.create_server(("localhost", 0)) as free:
    REDIS_PORT = free.getsockname()[1]
URL = f"redis://localhost:{REDIS_PORT}"
os.environ["REDIS_URL"] = URL

import counter  # after its setting, which it reads when it is imported

LIMIT = 3  # seconds within which every visit has an answer, whatever Redis does


class RedisServer:
    """A redis-server that can be made to fail as real ones do."""

    def __init__(self, folder):
        self.folder = folder
        self.client = redis.Redis(port=REDIS_PORT)
        self.start()

    def start(self):
        options = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(REDIS_PORT), *options],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert any("Ready to accept" in line for line in self.process.stdout)

    def stop(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait()
        self.process.stdout.close()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # returns when it has stopped

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def count(self):
        return int(self.client.get("visits") or 0)

    def commands(self):
        """Return how many commands it has run to count visits."""
        return self.client.info("commandstats").get("cmdstat_eval", {"calls": 0})[
            "calls"
        ]


class Relay(socketserver.ThreadingTCPServer):
    """Stands before Redis: holds each command that counts until `go`, loses replies if `cut`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), self.Connection)
        self.held, self.go, self.cut = threading.Semaphore(0), threading.Event(), False
        self.url = f"redis://localhost:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    class Connection(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(("localhost", REDIS_PORT)) as upstream:
                while command := self.request.recv(65536):
                    counts = b"EVAL" in command
                    if counts:
                        self.server.held.release()
                        self.server.go.wait(20)
                    upstream.sendall(command)
                    reply = upstream.recv(65536)
                    if counts and self.server.cut:
                        return
                    self.request.sendall(reply)


@pytest.fixture(scope="session")
def only_redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def store(only_redis):
    """The session's Redis, empty."""
    only_redis.client.flushall()
    only_redis.client.config_resetstat()
    counter.visits.total()  # ends the pause that an earlier failure began
    return only_redis


@pytest.fixture
def relay(store):
    with Relay() as relay:
        yield relay
        relay.go.set()
        relay.shutdown()


@pytest.fixture
def app(store):
    """The WSGI callable in this process, held to the rules of WSGI by WebTest's lint."""
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
        process.port = int(process.stdout.readline().split()[-1])
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def get(port, path="/", key=""):
    """Return the status and the text that a request gets on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers={"Idempotency-Key": key})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def number(text):
    return int(re.fullmatch(r"Visit (\d+), served by \S+\n", text)[1])


def numbers(answers):
    return [number(text) for status, text in answers if status == 200]


def visit(app, key, status=200):
    return app.get("/", headers={"Idempotency-Key": key}, status=status)


def visit_until_served(key, *ports):
    """Ask under one key, at one port after the other, until there is a number."""
    deadline = time.monotonic() + 20
    for port in itertools.cycle(ports):
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, text = get(port, key=key)
            if status == 200:
                return number(text)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline


def test_a_visit_gets_the_next_number(app, store):
    for expected in (1, 2, 3):
        answer = app.get("/?query")
        assert answer.text == f"Visit {expected}, served by {socket.gethostname()}\n"
    assert answer.headers["Content-Type"] == "text/plain"
    assert answer.headers["Cache-Control"] == "no-store"
    assert store.count() == 3


def test_head_has_the_headers_of_get(app, store):
    store.client.set("visits", 8)
    for _ in ("9", "10"):  # a digit more is a byte more
        head = app.head("/")
        assert head.body == b"" and head.headers == app.get("/").headers


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [
        *((405, method, "/") for method in ("POST", "PUT", "DELETE", "OPTIONS")),
        *((405, "POST", path) for path in ("/health", "/elsewhere")),
        *((404, "GET", path) for path in ("/favicon.ico", "/%2e", "/health/")),
        *((200, "GET", path) for path in ("/health", "/ready")),
        *((200, "HEAD", path) for path in ("/", "/health", "/ready")),
    ],
)
def test_nothing_but_a_get_of_the_root_counts(app, store, status, method, path):
    answer = app.request(path, method=method, status=status)
    assert (answer.headers.get("Allow") == "GET, HEAD") == (status == 405)
    assert store.count() == 0


@pytest.mark.parametrize("path", ["//", "///?x", "/%2F", "/%2F?/"])
def test_what_waitress_takes_for_the_root_does_not_count(serve, store, path):
    with socket.create_connection(("127.0.0.1", serve().port), timeout=20) as line:
        line.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert line.recv(4096).startswith(b"HTTP/1.0 404")
    assert store.count() == 0


def test_a_key_has_one_number_for_a_minute(app, store):
    assert [number(visit(app, key).text) for key in "abaab"] == [1, 2, 1, 1, 2]
    assert store.count() == 2
    assert 0 < store.client.pttl("visits:a") <= 60_000


def test_a_visit_without_a_key_is_a_visit_of_its_own(app):
    assert [number(visit(app, "").text) for _ in range(3)] == [1, 2, 3]
    assert [number(app.get("/").text) for _ in range(3)] == [4, 5, 6]


@pytest.mark.parametrize("key", ["x" * 128, 'a "quoted" key', "{}[]*?:%2F", "\xe9\xff"])
def test_any_key_of_up_to_128_characters_will_do(app, key):
    assert number(visit(app, key).text) == number(visit(app, key).text) == 1


def test_a_key_that_is_too_long_is_refused(app, store):
    assert visit(app, "x" * 129, status=400).text == "The key is over 128 characters.\n"
    assert store.count() == 0


def test_a_key_has_one_number_on_every_replica_and_after_a_crash(serve, store):
    ports = [serve().port for _ in range(3)]
    answers = [get(port, key="a") for port in ports * 3]
    store.stop(signal.SIGKILL)
    store.start()
    answers += [get(port, key="a") for port in ports]
    assert numbers(answers) == [1] * 12
    assert store.count() == 1


@pytest.mark.parametrize("keys", [[""] * 20, ["same"] * 20], ids=["many", "one"])
def test_visits_that_wait_together_share_a_command(store, relay, keys):
    visits = counter.Visits(relay.url)
    with ThreadPoolExecutor(21) as pool:
        first = pool.submit(visits.count, "first")
        assert relay.held.acquire(timeout=20)
        others = [
            pool.submit(visits.count, key or str(n)) for n, key in enumerate(keys)
        ]
        wait_until(lambda: len(visits._waiting) == 20)
        relay.go.set()
        given = [visit.result() for visit in others]
    assert first.result() == 1
    assert sorted(given) == ([2] * 20 if keys[0] else list(range(2, 22)))
    assert store.count() == max(given)
    assert store.commands() == 2


def test_visits_that_wait_together_share_a_failure(store, relay):
    visits = counter.Visits(relay.url)
    relay.cut = True
    with ThreadPoolExecutor(21) as pool:
        first = pool.submit(visits.count, "first")
        assert relay.held.acquire(timeout=20)
        others = [pool.submit(visits.count, f"{n}") for n in range(20)]
        wait_until(lambda: len(visits._waiting) == 20)
        relay.go.set()
        for failed in (first, *others):
            with pytest.raises(redis.ConnectionError):
                failed.result()
    assert store.commands() == 1  # nobody waited for a failure of their own


def test_a_visit_whose_reply_is_lost_may_be_asked_for_again(store, relay):
    visits = counter.Visits(relay.url)
    relay.go.set()
    relay.cut = True
    with pytest.raises(redis.ConnectionError):
        visits.count("a")
    assert store.count() == 1
    relay.cut = False
    visits.total()
    assert [visits.count("a"), visits.count("b")] == [1, 2]


@pytest.mark.parametrize(("fail", "mend"), [("stop", "start"), ("freeze", "thaw")])
def test_without_redis_every_request_is_answered(
    app, store, caplog, monkeypatch, fail, mend
):
    getattr(store, fail)()
    for path in ("/", "/", "/ready"):
        began = time.monotonic()
        answer = app.get(path, headers={"Idempotency-Key": "a"}, status=503)
        assert time.monotonic() - began < LIMIT
        assert answer.headers["Retry-After"] == "1"
        assert answer.text == "No number for now. Please try again.\n"
    assert "Redis failed: " in caplog.text
    assert app.get("/health").text == "serving\n"
    getattr(store, mend)()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock is set back meanwhile
    key = {"Idempotency-Key": "a"}
    wait_until(lambda: app.get("/", headers=key, expect_errors=True).status_int == 200)
    assert app.get("/ready").text == "ready\n"
    assert number(visit(app, "a").text) == 1
    assert number(visit(app, "b").text) == 2


def test_a_redis_too_slow_for_an_answer_counts_a_visit_once(serve, store, relay):
    process = serve(REDIS_URL=relay.url)
    with ThreadPoolExecutor(40) as pool:
        keys = [str(n) for n in range(40)]
        given = pool.map(lambda key: visit_until_served(key, process.port), keys)
        for _ in range(2):  # the second command is sent when the first is given up
            assert relay.held.acquire(timeout=20)
        relay.go.set()
    assert sorted(given) == list(range(1, 41))
    assert store.count() == 40


def test_a_crowd_is_answered_in_time_though_redis_is_frozen(serve, store):
    process = serve()
    get(process.port)
    store.freeze()

    def timed_visit(_):
        began = time.monotonic()
        return get(process.port)[0], time.monotonic() - began

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(timed_visit, range(200)))
    store.thaw()
    assert {status for status, _ in answers} == {503}
    assert max(seconds for _, seconds in answers) < LIMIT


def test_an_error_from_redis_is_logged_and_nothing_counted(app, store, caplog):
    store.client.rpush("visits", "no number")
    for method, path in (("GET", "/"), ("HEAD", "/"), ("GET", "/ready")):
        app.request(path, method=method, status=503)
    assert "WRONGTYPE" in caplog.text
    store.client.set("visits", "no number")
    for method in ("GET", "HEAD"):
        app.request("/", method=method, status=503)
    store.client.delete("visits")
    assert app.get("/ready").status_int == 200
    assert number(app.get("/").text) == 1


def test_many_at_once_get_every_number_once(serve, store):
    process = serve()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(get, [process.port] * 2000))
    assert sorted(numbers(answers)) == list(range(1, 2001))
    assert store.count() == 2000
    process.kill()
    assert process.communicate()[1] == ""  # no warning of a queue, nor of anything else


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_visits_are_counted_once_though_redis_dies_meanwhile(serve, store, how):
    process = serve()
    with ThreadPoolExecutor(16) as pool:
        keys = [str(n) for n in range(1000)]
        given = pool.map(lambda key: visit_until_served(key, process.port), keys)
        wait_until(lambda: store.count() > 300)
        store.stop(how)
        store.start()
    assert sorted(given) == list(range(1, 1001))
    assert store.count() == 1000


def test_visits_that_sigterm_interrupts_are_counted_once_elsewhere(serve, store, relay):
    ending, other = serve(REDIS_URL=relay.url), serve()
    with ThreadPoolExecutor(60) as pool:
        keys = [str(n) for n in range(60)]
        given = pool.map(
            lambda key: visit_until_served(key, ending.port, other.port), keys
        )
        assert relay.held.acquire(timeout=20)
        ending.terminate()
        relay.go.set()
    assert ending.wait(20) == 0
    assert sorted(given) == list(range(1, 61))
    assert store.count() == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_quietly(serve, number):
    process = serve()
    get(process.port)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.communicate() == ("", "")


def test_it_keeps_to_one_core_where_the_system_allows(serve):
    if hasattr(os, "sched_getaffinity"):  # a Mac has none
        assert len(os.sched_getaffinity(serve().pid)) == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("REDIS_URL", "nonsense"),
        ("REDIS_URL", ""),
        ("REDIS_URL", "http://localhost"),
        ("REDIS_URL", "redis://localhost:port"),
        ("REDIS_URL", "redis://localhost:70000"),
        ("REDIS_URL", "redis://localhost?tiemout=1"),
        ("REDIS_URL", "redis://localhost?protocol=9"),
        ("REDIS_URL", "redis://localhost?cache=x"),
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
