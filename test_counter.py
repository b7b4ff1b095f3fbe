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
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from webtest import TestApp

import counter

if not shutil.which("redis-server"):
    pytest.exit("no redis-server on the PATH: the tests start their own", returncode=1)

# The servers started here must not ignore Ctrl-C, as what a shell starts with & does.
signal.signal(signal.SIGINT, signal.default_int_handler)
TIME_OUT = 3.5  # seconds: more than counter.py waits for Redis to connect and to answer


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


class RedisServer:
    """A redis-server, and three ways in which real ones fail."""

    def __init__(self, folder, *options):
        self.port = free_port()
        self.url = f"redis://localhost:{self.port}"
        self.command = ["redis-server", "--port", str(self.port), "--save", ""]
        self.command += ["--dir", folder, *options]
        self.client = redis.Redis(port=self.port)
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert any("Ready to accept" in line for line in self.process.stdout)

    def run(self, command):
        return self.client.execute_command(*command.split())

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
        limit = threading.Timer(20, thaw)  # for a test that would wait for ever
        limit.start()
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # returns when it has stopped
        try:
            yield
        finally:
            limit.cancel()
            thaw()

    @contextlib.contextmanager
    def slow(self, seconds=60):
        """Hold every command that could write until the end."""
        self.client.client_pause(1000 * seconds, all=False)
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
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def store(redis_server):
    """The session's Redis, empty."""
    redis_server.client.flushall()
    redis_server.client.config_resetstat()
    return redis_server


@pytest.fixture
def visits(store):
    """A counter in this process."""
    return counter.Counter(store.url)


@pytest.fixture
def app(visits):
    """The WSGI callable in this process, held to the rules of WSGI by WebTest's lint."""
    return TestApp(counter.create_app(visits))


@pytest.fixture
def serve(store):
    """Return a function that starts `python counter.py` and returns its process."""
    processes = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "counter.py"],
            # Port 0 is any that is free.
            env=os.environ | {"PORT": "0", "REDIS_URL": store.url},
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
    store.client.expire("{visits}:a", 1)
    assert visit(app, "a") == 1  # which begins the minute anew
    assert 50_000 < store.client.pttl("{visits}:a") <= 60_000


@pytest.mark.parametrize("key", ["x" * 128, 'a "quoted" key', "{}[]*?:%2F", "\xe9\xff"])
def test_any_key_of_up_to_128_characters_will_do(app, key):
    assert visit(app, key) == visit(app, key) == 1


def test_a_key_that_is_too_long_is_refused(app, store):
    answer = app.get("/", headers={"Idempotency-Key": "x" * 129}, status=400)
    assert answer.text == "The key is over 128 characters.\n"
    assert store.count() == 0


def test_it_counts_in_a_redis_cluster(tmp_path):
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    cluster = RedisServer(tmp_path, *options)
    try:
        cluster.run("CLUSTER ADDSLOTSRANGE 0 16383")
        wait_until(lambda: b"cluster_state:ok" in cluster.run("CLUSTER INFO"))
        visits = counter.Counter(cluster.url)
        assert [visits.count(key) for key in ("a", "b", "a")] == [1, 2, 1]
    finally:
        cluster.kill()


@pytest.mark.parametrize("keys", [[str(n) for n in range(20)], ["one key"] * 20])
def test_visits_that_wait_together_share_a_command(store, visits, keys):
    with ThreadPoolExecutor(21) as pool, store.slow():
        first = pool.submit(visits.count, "the first")
        wait_until(store.holds_a_command)
        others = [pool.submit(visits.count, key) for key in keys]
        wait_until(lambda: len(visits._batch[0]) == 21)  # beside the key of the count
    assert first.result() == 1
    assert store.commands() == 2
    assert store.count() == 1 + len(set(keys))
    assert [future.result() for future in others] == [*map(visits.count, keys)]


def failures(pool, visits, keys):
    """Return the kinds of the errors that these visits get."""
    futures = [pool.submit(visits.count, key) for key in keys]
    return {type(future.exception()) for future in futures}


def test_visits_that_wait_together_share_a_failure(store, visits, caplog):
    keys = [str(n) for n in range(20)]
    with ThreadPoolExecutor(21) as pool, store.frozen():
        first = pool.submit(visits.count, "the first")
        wait_until(lambda: visits._turn.locked() and visits._batch[0] == ["visits"])
        assert failures(pool, visits, keys) == {redis.TimeoutError}
        assert type(first.exception()) is redis.TimeoutError
    wait_until(lambda: store.commands() == 2)
    assert len(caplog.records) == 2
    assert sorted(map(visits.count, ["the first", *keys])) == list(range(1, 22))


def test_an_error_of_the_program_reaches_every_visit(visits, monkeypatch):
    with ThreadPoolExecutor(20) as pool:
        monkeypatch.setattr(counter, "COUNT", "return {}")
        assert failures(pool, visits, range(20)) == {IndexError}
        monkeypatch.setattr(counter, "COUNT", None)
        assert failures(pool, visits, range(20)) == {redis.DataError}
    monkeypatch.undo()
    assert visits.count("a") == 1


def test_no_visit_waits_much_longer_than_the_others(visits):
    overtaken = []  # for each finished visit, how many others finished meanwhile

    def ask_again_and_again(_):
        for _ in range(200):
            before = len(overtaken)
            visits.count(str(uuid.uuid4()))
            overtaken.append(len(overtaken) - before)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask_again_and_again, range(32)))
    # Hardly anybody comes first twice, and of a hundred visits, 99 are overtaken by each
    # other visitor a few times at most. (The last one may be a thread that had no core.)
    assert overtaken.count(0) < 0.1 * len(overtaken)
    assert sorted(overtaken)[-len(overtaken) // 100] < 10 * 32


def test_a_slow_disk_is_no_failure(app, store):
    # A command may wait for two syncs: one for the visits before it, and its own.
    with store.slow(seconds=2):
        assert number(app.get("/").text) == 1


@pytest.mark.parametrize("state", [RedisServer.dead, RedisServer.frozen])
def test_without_redis_all_is_answered(app, store, caplog, state):
    with state(store):
        for path in ("/", "/", "/ready"):
            began = time.monotonic()
            answer = app.get(path, status=503)
            assert time.monotonic() - began < TIME_OUT
            assert answer.headers["Retry-After"] == "1"
            assert answer.text == "No number for now. Please try again.\n"
        assert "Redis failed: " in caplog.text
        assert app.get("/health").text == "serving\n"
    assert app.get("/ready").text == "ready\n"
    assert number(app.get("/").text) > 0


@pytest.mark.parametrize(
    "refusal",
    [
        *(f"ACL SETUSER default -{name}" for name in ("eval", "get", "incrby", "set")),
        "ACL SETUSER default resetkeys ~visits",
        "ACL SETUSER default resetkeys ~{visits}:*",
        "CONFIG SET min-replicas-to-write 1",
        "CONFIG SET maxmemory 1",
        "REPLICAOF localhost 1",
    ],
)
def test_it_is_ready_only_when_a_visit_could_be_counted(app, store, refusal):
    store.run(refusal)
    try:
        for path in ("/ready", "/"):
            app.get(path, status=503)
    finally:
        store.run("ACL SETUSER default allkeys allcommands")
        store.run("CONFIG SET min-replicas-to-write 0 maxmemory 0")
        store.run("REPLICAOF NO ONE")
    assert app.get("/ready").text == "ready\n"
    assert number(app.get("/").text) == 1


def test_a_crowd_is_answered_in_time_and_counted_once_when_it_asks_again(serve, store):
    def timed_visit(key):
        began = time.monotonic()
        return get(port, key)[0], time.monotonic() - began < 4 * TIME_OUT

    # As many as the proxy sends to one replica, and twice as many as it has threads: a
    # visit may wait for a thread while two commands fail, and then for two more.
    port, keys = serve().port, [str(n) for n in range(64)]
    with ThreadPoolExecutor(64) as pool:
        with store.frozen():
            assert set(pool.map(timed_visit, keys)) == {(503, True)}
        numbers = pool.map(lambda key: get_number(key, port), keys)
    assert sorted(numbers) == list(range(1, 65))
    assert store.count() == 64


def test_an_error_from_redis_is_logged_and_answered(app, store, caplog):
    store.client.rpush("visits", "no number")
    for method, path in (("GET", "/"), ("HEAD", "/"), ("GET", "/ready")):
        app.request(path, method=method, status=503)
    assert "WRONGTYPE" in caplog.text
    store.client.set("visits", "no number")
    for method in ("HEAD", "GET"):
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
        ("PORT", "in use"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start(store, setting, value):
    if value == "in use":
        value = str(store.port)
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
