"""The counter's tests: real servers and a real Redis, which some tests kill or freeze."""

import contextlib
import http.client
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from webtest import TestApp

import counter

if not shutil.which("redis-server"):
    pytest.exit("no redis-server on the PATH: the tests start their own", returncode=1)

# The servers started here must not ignore Ctrl-C, as background jobs of a shell do.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.setswitchinterval(1e-5)  # seconds. Threads take turns so often that a race shows.
TIME_OUT = 3.5  # seconds: more than one command and a 503 take


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


class RedisServer:
    """A redis-server, and the ways in which real ones fail."""

    def __init__(self, folder, *options):
        self.port = free_port()
        self.url = f"redis://localhost:{self.port}"
        self.command = ["redis-server", "--port", str(self.port), "--save", ""]
        self.command += ["--dir", folder, *options]
        self.client = redis.Redis(port=self.port)
        self.start()

    def start(self, until="Ready to accept", options=()):
        command = [*self.command, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert any(until in line for line in self.process.stdout)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # returns when it has stopped

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def start_slowly(self):
        """Start it again with a file of 99 keys, of which it loads ten a second."""
        for n in range(99):
            self.client.set(n, os.urandom(2000))
        self.client.save()
        self.kill()
        slowly = "--key-load-delay 100000 --loading-process-events-interval-bytes 1024"
        self.start("Loading RDB", slowly.split())

    def hold(self, seconds=60):
        """Let every command that may write wait for so long, or until `client_unpause`."""
        self.client.client_pause(1000 * seconds, all=False)

    def holds_a_command(self):
        return self.client.info("clients")["blocked_clients"] > 0

    def commands(self):
        """Return how many commands have counted visits."""
        return self.client.info("commandstats")["cmdstat_eval"]["calls"]

    def count(self):
        return int(self.client.get("visits") or 0)


@pytest.fixture
def store(tmp_path):
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def visits(store):
    """A counter in this process."""
    return counter.Counter(store.url)


@pytest.fixture
def app(store):
    """The WSGI callable in this process, held to the rules of WSGI by WebTest's lint."""
    return TestApp(counter.create_app(store.url))


@pytest.fixture
def serve(store):
    """Return a function that starts a server of the counter and returns its process."""
    processes = []

    def start(*command):
        process = subprocess.Popen(
            [sys.executable, *(command or ["counter.py"])],
            # Port 0 is any that is free.
            env=os.environ | {"PORT": "0", "REDIS_URL": store.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        first_line = (process.stderr if command else process.stdout).readline()
        process.port = int(re.search(r"(\d+)$", first_line)[1])
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


def visit(app, key=""):
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


def test_head_has_the_headers_of_the_next_visit(app, store):
    assert app.head("/").headers == app.get("/").headers
    store.client.set("visits", 8)
    for expected in (9, 10):  # a digit more is a byte more
        head, answer = app.head("/"), app.get("/")
        assert (head.body, head.headers) == (b"", answer.headers)
        assert number(answer.text) == expected


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/", 405, "Use GET or HEAD.\n"),
        ("OPTIONS", "/health", 405, "Use GET or HEAD.\n"),
        ("GET", "/favicon.ico", 404, "Only / counts visits.\n"),
        ("GET", "/health/", 404, "Only / counts visits.\n"),
        ("GET", "/health", 200, "serving\n"),
        ("HEAD", "/health", 200, ""),
        ("HEAD", "/", 200, ""),
    ],
)
def test_nothing_but_a_get_of_the_root_counts(app, store, method, path, status, text):
    answer = app.request(path, method=method, status=status)
    assert answer.text == text
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
    assert visit(app, key) == visit(app, key) == 1 < visit(app, key[:-1])


def test_a_key_that_is_too_long_is_refused(app, store):
    answer = app.get("/", headers={"Idempotency-Key": "x" * 129}, status=400)
    assert answer.text == "The key is over 128 characters.\n"
    assert store.count() == 0


def test_it_counts_in_a_redis_cluster(tmp_path):
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    cluster = RedisServer(tmp_path, *options)
    try:
        cluster.client.cluster("addslots", *range(16384))
        wait_until(lambda: cluster.client.cluster("info")["cluster_state"] == "ok")
        visits = counter.Counter(cluster.url)
        assert [visits.number(key) for key in ("a", "b", "a")] == [1, 2, 1]
    finally:
        cluster.kill()


def test_visits_that_come_together_share_commands_and_take_turns(visits, store):
    numbers, overtaken = [], []  # of each visit, and how many ended while it waited

    def visit_again_and_again(_):
        for _ in range(200):
            before = len(overtaken)
            numbers.append(visits.number(str(uuid.uuid4())))
            overtaken.append(len(overtaken) - before)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(visit_again_and_again, range(32)))
    assert sorted(numbers) == list(range(1, 32 * 200 + 1))
    assert store.count() == len(overtaken) == 32 * 200
    assert store.commands() < len(overtaken) / 4
    # A visitor rarely gets two numbers in a row. And of a hundred visits, each other visitor
    # overtakes 99 less than ten times. (The last may be a thread that had no core.)
    assert overtaken.count(0) < 0.1 * len(overtaken)
    assert sorted(overtaken)[-len(overtaken) // 100] < 10 * 32


def test_visits_that_come_together_with_one_key_get_one_number(visits, store):
    with ThreadPoolExecutor(20) as pool:
        for round in (1, 2, 3):
            assert {*pool.map(visits.number, [f"key {round}"] * 20)} == {round}
    assert store.count() == 3


def failures(visits, keys):
    """Return the kinds of the errors of visits that come together."""
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(visits.number, key) for key in keys]
        return {type(future.exception()) for future in futures}


def test_visits_that_come_together_share_a_failure(visits, store, caplog):
    store.freeze()
    began = time.monotonic()
    assert failures(visits, range(20)) == {redis.TimeoutError}
    # One command for those that came first, and one for those that came while it waited.
    assert time.monotonic() - began < 2 * TIME_OUT
    assert 1 <= len(caplog.records) <= 2
    store.thaw()
    assert sorted(map(visits.number, range(20))) == list(range(1, 21))


@pytest.mark.parametrize(
    ("script", "error"), [("return {}", IndexError), (None, redis.DataError)]
)
def test_no_visit_waits_for_ever_after_a_bug(visits, monkeypatch, script, error):
    with monkeypatch.context() as patch:
        patch.setattr(counter, "COUNT", script)
        assert failures(visits, range(20)) == {error}
    assert visits.number("a") == 1


@pytest.mark.parametrize(
    ("fault", "reason", "head"),
    [
        ("SET visits many", "not an integer", 503),
        ("RPUSH visits 1", "WRONGTYPE", 503),
        ("CONFIG SET maxmemory 1", "maxmemory", 200),
        ("CONFIG SET min-replicas-to-write 1", "NOREPLICAS", 200),
        ("REPLICAOF localhost 1", "read only replica", 200),
        ("ACL SETUSER default -incrby", "command", 200),
        ("ACL SETUSER default -eval", "command", 503),
        ("ACL SETUSER default resetkeys", "key", 503),
        (RedisServer.kill, "refused", 503),
        (RedisServer.freeze, "Timeout", 503),
        (RedisServer.start_slowly, "loading", 503),
    ],
)
def test_the_reason_for_a_503_is_logged_once(app, store, caplog, fault, reason, head):
    if callable(fault):
        fault(store)
    else:
        store.client.execute_command(*fault.split())
    for method, status in (("GET", 503), ("HEAD", head)):
        caplog.clear()
        began = time.monotonic()
        answer = app.request("/", method=method, status=status)
        if status == 503:
            assert 0.25 <= time.monotonic() - began < TIME_OUT
            assert answer.headers["Retry-After"] == "1"
            assert len(caplog.records) == 1
            assert caplog.messages[0].startswith("Redis failed: ")
            assert reason in caplog.text or method == "HEAD"
        if method == "GET":
            assert answer.text == "No number yet. Please try again.\n"
    assert app.get("/health").text == "serving\n"


def test_it_counts_again_as_soon_as_redis_does(app, store):
    assert visit(app) == 1
    store.kill()
    app.get("/", status=503)
    store.start()
    assert visit(app) == 1  # as this Redis keeps nothing


def test_a_redis_that_takes_two_seconds_is_waited_for(app, store):
    # A command may wait for two syncs: one for the visits before it, and its own.
    store.hold(seconds=2)
    assert visit(app) == 1


def test_a_crowd_is_answered_in_time_and_counted_once_when_it_asks_again(serve, store):
    def timed_visit(key):
        began = time.monotonic()
        return get(port, key)[0], time.monotonic() - began < 4 * TIME_OUT

    # As many as the proxy sends to one replica, and twice as many as it has threads: a
    # visit may wait for a thread while two commands fail, and then for two more.
    port, keys = serve().port, [str(n) for n in range(64)]
    with ThreadPoolExecutor(64) as pool:
        store.freeze()
        assert set(pool.map(timed_visit, keys)) == {(503, True)}
        store.thaw()
        numbers = pool.map(lambda key: get_number(key, port), keys)
    assert sorted(numbers) == list(range(1, 65))
    assert store.count() == 64


def test_2000_visits_get_2000_numbers_and_nothing_is_logged(serve, store):
    process = serve()
    with ThreadPoolExecutor(50) as pool:
        answers = pool.map(get, [process.port] * 2000)
    assert sorted(number(text) for _, text in answers) == list(range(1, 2001))
    process.terminate()
    assert process.communicate(timeout=20) == ("", "")  # no warning of a queue, for one


def test_visits_that_sigterm_interrupts_are_counted_once_elsewhere(serve, store):
    ending, other = serve(), serve()
    with ThreadPoolExecutor(60) as pool:
        store.hold()
        ports, keys = (ending.port, other.port), range(60)
        numbers = pool.map(lambda key: get_number(str(key), *ports), keys)
        wait_until(store.holds_a_command)
        ending.terminate()
        assert ending.wait(20) == 0
        store.client.client_unpause()
    assert sorted(numbers) == list(range(1, 61))
    assert store.count() == 60


def test_ctrl_c_ends_it_quietly(serve):
    process = serve()
    get(process.port)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


def test_waitress_serve_can_serve_it(serve):
    process = serve("-m", "waitress", "--port=0", "--call", "counter:create_app")
    assert number(get(process.port)[1]) == 1


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
