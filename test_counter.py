"""The counter's tests: real servers and a real Redis, which some tests kill or freeze."""

import contextlib
import functools
import http.client
import itertools
import os
import re
import shutil
import signal
import socket
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
os.environ["REDIS_URL"] = f"redis://localhost:{REDIS_PORT}"

import counter  # only now: it reads REDIS_URL when it is imported

LIMIT = 3  # seconds within which every visit has an answer, whatever Redis does


class RedisServer:
    """A redis-server, and three ways in which real ones fail."""

    def __init__(self):
        self.client = redis.Redis(port=REDIS_PORT)
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(REDIS_PORT), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any("Ready to accept" in line for line in self.process.stdout)

    def kill(self):
        self.process.kill()
        self.process.communicate()

    @contextlib.contextmanager
    def dead(self):
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self):
        thaw = functools.partial(self.process.send_signal, signal.SIGCONT)
        limit = threading.Timer(10, thaw)  # for a test that would wait for ever
        limit.start()
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # returns when it has stopped
        try:
            yield
        finally:
            limit.cancel()
            thaw()

    @contextlib.contextmanager
    def slow(self):
        """Hold every command that could write until the end."""
        self.client.client_pause(60_000, all=False)
        try:
            yield
        finally:
            self.client.client_unpause()

    def holds_a_command(self):
        return self.client.info("clients")["blocked_clients"] > 0

    def commands(self):
        """Return how many commands have counted visits."""
        evals = self.client.info("commandstats").get("cmdstat_eval")
        return evals["calls"] if evals else 0

    def count(self):
        return int(self.client.get("visits") or 0)


@pytest.fixture(scope="session")
def redis_server():
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture
def store(redis_server):
    """The session's Redis, empty."""
    redis_server.client.flushall()
    redis_server.client.config_resetstat()
    counter.visits.total()  # ends the pause that an earlier failure began
    return redis_server


@pytest.fixture
def app(store):
    """The WSGI callable in this process, held to the rules of WSGI by WebTest's lint."""
    return TestApp(counter.app)


@pytest.fixture
def serve(store):
    """Return a function that starts `python counter.py` and returns its process."""
    processes = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "counter.py"],
            env=os.environ | {"PORT": "0"},  # any port that is free
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


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "20 seconds were not enough"
        time.sleep(0.01)


def get(port, key=""):
    """Return the status and the text that a visit gets on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Idempotency-Key": key})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def number(text):
    return int(re.fullmatch(r"Visit (\d+), served by \S+\n", text)[1])


def visit(app, key):
    return number(app.get("/", headers={"Idempotency-Key": key}).text)


def get_number(key, *ports):
    """Ask under one key, at one port after the other, until there is a number."""
    deadline = time.monotonic() + 20
    for port in itertools.cycle(ports):
        assert time.monotonic() < deadline, "20 seconds were not enough"
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, text = get(port, key)
            if status == 200:
                return number(text)


def test_a_visit_gets_the_next_number(app, store):
    for expected in (1, 2, 3):
        answer = app.get("/?query")
        assert answer.text == f"Visit {expected}, served by {socket.gethostname()}\n"
    assert answer.headers["Content-Type"] == "text/plain"
    assert answer.headers["Cache-Control"] == "no-store"
    assert store.count() == 3


def test_head_has_the_headers_of_get(app, store):
    store.client.set("visits", 8)
    for expected in (9, 10):  # a digit more is a byte more
        head, answer = app.head("/"), app.get("/")
        assert (head.body, head.headers) == (b"", answer.headers)
        assert number(answer.text) == expected


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [
        *((405, method, "/") for method in ("POST", "PUT", "DELETE", "OPTIONS")),
        *((405, "POST", path) for path in ("/health", "/elsewhere")),
        *((404, "GET", path) for path in ("/favicon.ico", "/health/")),
        *((200, "GET", path) for path in ("/health", "/ready")),
        *((200, "HEAD", path) for path in ("/", "/health", "/ready")),
    ],
)
def test_nothing_but_a_get_of_the_root_counts(app, store, status, method, path):
    answer = app.request(path, method=method, status=status)
    assert answer.headers.get("Allow") == ("GET, HEAD" if status == 405 else None)
    assert store.count() == 0


def test_a_key_has_one_number_for_a_minute(app, store):
    keys = ["a", "b", "a", "", "", "b", "a"]  # an empty key is no key
    assert [visit(app, key) for key in keys] == [1, 2, 1, 3, 4, 2, 1]
    assert 50_000 < store.client.pttl("visits:a") <= 60_000


@pytest.mark.parametrize("key", ["x" * 128, 'a "quoted" key', "{}[]*?:%2F", "\xe9\xff"])
def test_any_key_of_up_to_128_characters_will_do(app, key):
    assert visit(app, key) == visit(app, key) == 1


def test_a_key_that_is_too_long_is_refused(app, store):
    answer = app.get("/", headers={"Idempotency-Key": "x" * 129}, status=400)
    assert answer.text == "The key is over 128 characters.\n"
    assert store.count() == 0


@pytest.mark.parametrize("keys", [[str(n) for n in range(20)], ["one key"] * 20])
def test_visits_that_wait_together_share_a_command(store, keys):
    with ThreadPoolExecutor(21) as pool, store.slow():
        first = pool.submit(counter.visits.count, "the first")
        wait_until(store.holds_a_command)
        others = [pool.submit(counter.visits.count, key) for key in keys]
        wait_until(lambda: len(counter.visits._waiting) == 20)
    assert first.result() == 1
    assert store.commands() == 2
    assert store.count() == 1 + len(set(keys))
    assert [future.result() for future in others] == [*map(counter.visits.count, keys)]


def test_visits_that_wait_together_share_a_failure(store):
    keys = [str(n) for n in range(20)]
    with ThreadPoolExecutor(20) as pool, store.frozen():
        for future in [pool.submit(counter.visits.count, key) for key in keys]:
            with pytest.raises(redis.RedisError):
                future.result()
    wait_until(store.commands)  # now it runs what it was sent while it was frozen
    counter.visits.total()  # ends the pause
    assert store.commands() == 1
    assert sorted(map(counter.visits.count, keys)) == list(range(1, 21))


@pytest.mark.parametrize("state", [RedisServer.dead, RedisServer.frozen])
def test_without_redis_all_is_answered(app, store, caplog, monkeypatch, state):
    with state(store):
        for path in ("/", "/", "/ready"):
            began = time.monotonic()
            answer = app.get(path, status=503)
            assert time.monotonic() - began < LIMIT
            assert answer.headers["Retry-After"] == "1"
            assert answer.text == "No number for now. Please try again.\n"
        assert "Redis failed: " in caplog.text
        assert app.get("/health").text == "serving\n"
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock may be set back meanwhile
    wait_until(lambda: app.get("/", expect_errors=True).status_int == 200)
    assert app.get("/ready").text == "ready\n"


def test_a_crowd_is_answered_in_time_and_counted_once_when_it_asks_again(serve, store):
    def timed_visit(key):
        began = time.monotonic()
        return get(port, key)[0], time.monotonic() - began < LIMIT

    port, keys = serve().port, [str(n) for n in range(200)]
    with ThreadPoolExecutor(200) as pool:
        with store.frozen():
            assert set(pool.map(timed_visit, keys)) == {(503, True)}
        numbers = pool.map(lambda key: get_number(key, port), keys)
    assert sorted(numbers) == list(range(1, 201))
    assert store.count() == 200


def test_an_error_from_redis_is_logged_and_answered(app, store, caplog):
    store.client.rpush("visits", "no number")
    for method, path in (("GET", "/"), ("HEAD", "/"), ("GET", "/ready")):
        app.request(path, method=method, status=503)
    assert "WRONGTYPE" in caplog.text
    store.client.set("visits", "no number")
    for method in ("HEAD", "GET"):  # in this order, as a reply to HEAD ends the pause
        app.request("/", method=method, status=503)
    store.client.delete("visits")
    assert app.get("/ready").status_int == 200
    assert number(app.get("/").text) == 1


def test_many_at_once_get_every_number_once_and_nothing_is_logged(serve, store):
    process = serve()
    with ThreadPoolExecutor(50) as pool:
        answers = pool.map(get, [process.port] * 2000)
    assert sorted(number(text) for _, text in answers) == list(range(1, 2001))
    process.terminate()
    assert process.communicate(timeout=20) == ("", "")  # no warning of a queue, for one


def test_visits_that_sigterm_interrupts_are_counted_once_elsewhere(serve, store):
    ending, other = serve(), serve()
    with ThreadPoolExecutor(60) as pool, store.slow():
        ports, keys = (ending.port, other.port), range(60)
        numbers = pool.map(lambda key: get_number(str(key), *ports), keys)
        wait_until(store.holds_a_command)
        ending.terminate()
        assert ending.wait(20) == 0
    assert sorted(numbers) == list(range(1, 61))
    assert store.count() == 60


def test_ctrl_c_ends_it_quietly(serve):
    process = serve()
    get(process.port)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


def test_it_keeps_to_one_core_where_the_system_allows(serve):
    if hasattr(os, "sched_getaffinity"):  # a Mac has none
        assert len(os.sched_getaffinity(serve().pid)) == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("REDIS_URL", "nonsense"),
        ("REDIS_URL", "redis://localhost?tiemout=1"),
        ("REDIS_URL", "redis://localhost?cache=x"),
        ("REDIS_URL", "redis://localhost?maint_notifications_config=x"),
        ("REDIS_URL", "redis://:s3c/ret@localhost"),
        ("PORT", "five thousand"),
        ("PORT", "70000"),
        ("PORT", str(REDIS_PORT)),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start(store, setting, value):
    ended = subprocess.run(
        [sys.executable, "counter.py"],
        check=False,
        env=os.environ | {"PORT": "0", setting: value},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(rf"counter: {setting} [^\n]+\n", ended.stderr)
    assert "s3c" not in ended.stderr
