"""The promises, checked on the whole stack while it is loaded and broken. Needs Docker.

pytest .ci               all of them, and at the end the figures seen
pytest .ci -k frozen     one of them
"""

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VISIT = re.compile(r"Visit (\d+), served (?:anew )?by (\S+)\n")
NO_HARM = {}, 0, 0


def docker(command, *words, check=True):
    """Run docker with the words of the command and more, and return what it prints."""
    command = ["docker", *command.split(), *words]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=150
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "a minute was not enough"
        time.sleep(0.1)


class Stack:
    """The services, with a project name, images and a port of their own."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        self.name = f"counter-ci-{os.getpid()}"
        self.test_image = f"{self.name}-test"
        os.environ |= {"REGISTRY": f"{self.name}/", "PORT": str(self.port)}
        os.environ.pop("BIND", None)
        shutil.copytree(ROOT, folder, ignore=lambda *_: [".git"], dirs_exist_ok=True)

    def build(self):
        docker(f"build -q --target test -t {self.test_image}", self.folder)
        self.compose("build -q")

    def compose(self, command, *words, check=True):
        stack = f"compose -p {self.name} -f {self.folder}/compose.yml"
        return docker(f"{stack} {command}", *words, check=check)

    def up(self, options="", web=3):
        self.compose(f"up -d --scale web={web} {options}")
        health = "ps --format {{.Health}}"
        wait_until(lambda: set(self.compose(health).split()) == {"healthy"})

    def containers(self, service):
        return self.compose(f"ps -q {service}").split()

    def exec(self, service, command):
        return self.compose(f"exec -T {service} {command}", check=False)

    def pid(self, container):
        return docker("inspect -f {{.State.Pid}}", container)

    def as_root(self, service, program):
        """Run a Python program as root; its argument is the service's host process id."""
        pid = self.pid(self.containers(service)[0])
        power = "--pid host --user root --cap-add SYS_PTRACE"
        docker(f"run --rm {power} {self.test_image} python -c", program, pid)

    def kill_9(self, service):
        """Kill the process from outside, so that Docker's restart policy applies."""
        container = self.containers(service)[0]
        before = self.pid(container)
        self.as_root(service, "import os, sys; os.kill(int(sys.argv[1]), 9)")
        wait_until(lambda: self.pid(container) not in (before, "0"))

    def away(self, service, down, up, seconds=4):
        container = self.containers(service)[0]
        docker(down, container)
        time.sleep(seconds)
        docker(up, container)

    def new_code(self, web):
        file = Path(self.folder, "counter.py")
        code = file.read_text()
        replica = ", served anew by" if ", served by" in code else ", served by"
        file.write_text(re.sub(", served (anew )?by", replica, code))
        self.up("--build", web=web)

    def count(self):
        return int(self.exec("redis", "redis-cli get visits") or 0)

    def unfit(self):
        """Return how often the proxy has found a replica unfit."""
        return self.compose("logs proxy").count("is DOWN, reason")

    def send(self, data):
        """Return all that is answered to these bytes until the connection is closed."""
        answer = b""
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", self.port), timeout=15) as line,
        ):
            line.sendall(data)
            while more := line.recv(65536):
                answer += more
        return answer.decode()

    def get(self, key=""):
        """Return the head and the text that a visit is answered with."""
        request = f"GET / HTTP/1.0\r\nIdempotency-Key: {key}\r\n\r\n"
        head, _, text = self.send(request.encode()).partition("\r\n\r\n")
        return head, text

    def visit(self, key=""):
        """Return the number of a visit."""
        return int(VISIT.fullmatch(self.get(key)[1])[1])

    def remove(self):
        self.compose("unpause", check=False)
        self.compose("down --volumes --timeout 3 --rmi all", check=False)
        docker("image rm", self.test_image, check=False)


class Visitors:
    """Clients on keep-alive connections that visit one after the other, and all they saw.

    With keys, a client asks again under the same key until it has a number.
    """

    def __init__(self, port, clients, keys):
        self.port, self.keys = port, keys
        self.numbers, self.waits = [], []
        self.replicas, self.errors = Counter(), Counter()
        self.over = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=[self.all(clients)])

    async def all(self, clients):
        await asyncio.gather(*(self.visitor() for _ in range(clients)))

    async def visitor(self):
        line = key = None
        while not self.over.is_set() or key:
            began = time.monotonic()
            key = self.keys and (key or str(uuid.uuid4()))
            header = f"Idempotency-Key: {key}\r\n" if key else ""
            try:
                line = line or await asyncio.open_connection("127.0.0.1", self.port)
                line[1].write(f"GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
                head = (await line[0].readuntil(b"\r\n\r\n")).decode().lower()
                length = int(re.search(r"content-length: (\d+)", head)[1])
                visit = VISIT.fullmatch((await line[0].readexactly(length)).decode())
                error = head.split()[1]
                if "connection: close" in head:
                    line = line[1].close()
            except (OSError, EOFError) as failure:
                line, visit, error = None, None, type(failure).__name__
                await asyncio.sleep(0.02)
            self.waits.append(time.monotonic() - began)
            if visit:
                self.numbers.append(int(visit[1]))
                self.replicas[visit[2]] += 1
                key = None
            else:
                self.errors[error] += 1

    @property
    def slowest(self):
        return max(self.waits)

    @property
    def harm(self):
        """Return the errors, how many numbers came twice, and how many to nobody."""
        given = set(self.numbers)
        missing = max(given, default=0) - min(given, default=1) + 1 - len(given)
        return dict(self.errors), len(self.numbers) - len(given), missing

    def __str__(self):
        errors, repeated, missing = self.harm
        return (
            f"{len(self.numbers)} visits, errors {errors}, {repeated} repeated, "
            f"{missing} missing, slowest {self.slowest:.2f} s"
        )


class Report:
    """Shows the services' last lines with a failure, and the figures seen at the end."""

    def __init__(self, stack):
        self.stack, self.figures = stack, []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            logs = self.stack.compose("logs --tail 15", check=False)
            report.sections.append(("the services' last lines", logs))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("figures seen")
        for line in self.figures:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def whole_stack(request):
    # Being ended is like Ctrl-C: what was made is removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(folder)
        stack.report = Report(stack)
        request.config.pluginmanager.register(stack.report)
        try:
            stack.build()
            yield stack
        finally:
            stack.remove()


@pytest.fixture
def stack(whole_stack):
    """Three replicas, all in use."""
    whole_stack.up()
    replicas = lambda: {whole_stack.get()[1].split()[-1] for _ in range(12)}
    wait_until(lambda: len(replicas()) == 3)
    return whole_stack


@pytest.fixture
def visitors(stack, request):
    """Return a context manager that yields Visitors, who visit until its end."""

    @contextlib.contextmanager
    def load(clients=32, keys=False):
        seen = Visitors(stack.port, clients, keys)
        seen.thread.start()
        try:
            wait_until(lambda: len(seen.waits) > 2 * clients)
            yield seen
            time.sleep(1)  # of load after the event
        finally:
            seen.over.set()
            seen.thread.join()
            stack.report.figures.append(f"{request.node.name}: {seen}")

    return load


# Promise 1: a visit counts exactly once.


def crash(stack, services=("redis", "web")):
    """For 60 s, kill, freeze or restart containers, one of each service at a time."""
    faults = [("kill", "start"), ("pause", "unpause"), ("restart", "start")]

    def torment(service):
        while time.monotonic() < end:
            container = random.choice(stack.containers(service))
            down, up = random.choice(faults)
            docker(down, container)
            time.sleep(random.uniform(1, 3))
            docker(up, container)
            time.sleep(random.uniform(1, 3))

    end = time.monotonic() + 60
    with ThreadPoolExecutor() as pool:
        list(pool.map(torment, services))


FREEZE, STOP = ("pause", "unpause"), ("stop", "start")
EVENTS = {  # what happens, and the longest that a visit may then take, in seconds
    "redis is killed": (lambda stack: stack.kill_9("redis"), 3),
    "redis is frozen for 4 s": (lambda stack: stack.away("redis", *FREEZE), 7),
    "redis is stopped for 4 s": (lambda stack: stack.away("redis", *STOP), 8),
    "a replica is killed": (lambda stack: stack.kill_9("web"), 1),
    "it is scaled to 1 and back": (lambda stack: (stack.up(web=1), stack.up(web=3)), 1),
    "new code comes": (lambda stack: stack.new_code(web=3), 4),
    "redis and replicas crash at random": (crash, 9),
}


@pytest.mark.parametrize("event", EVENTS)
def test_nobody_is_harmed_when(stack, visitors, event):
    cause, limit = EVENTS[event]
    before = stack.count()
    with visitors() as seen:
        cause(stack)
    assert seen.harm == NO_HARM
    assert seen.slowest < limit
    assert stack.count() - before == len(seen.numbers)


def test_a_frozen_replica_delays_only_the_visits_that_it_has(stack, visitors):
    with visitors() as seen:
        stack.away("web", *FREEZE, seconds=6)
    assert seen.harm == NO_HARM
    assert seen.slowest < 5
    assert sum(wait > 1 for wait in seen.waits) <= 16  # of 32 visitors, about a third


def test_new_code_for_the_only_replica_harms_nobody(stack, visitors):
    stack.up(web=1)
    with visitors() as seen:
        stack.new_code(web=1)
    assert seen.harm == NO_HARM
    assert seen.slowest < 4


def test_1000_visitors_at_once_do_not_notice_that_redis_is_stopped(stack, visitors):
    with visitors(clients=1000) as seen:
        stack.away("redis", *STOP)
    assert seen.harm == NO_HARM


def test_a_key_has_one_number_on_all_replicas_and_after_crashes(stack):
    numbers = [stack.visit("a key") for _ in range(10)]
    for service in ("redis", "proxy"):
        stack.kill_9(service)
        stack.up()
        numbers.append(stack.visit("a key"))
    assert set(numbers) == {stack.count()}


# Promise 2: a number once given is on disk.


def test_a_number_is_on_disk_before_it_is_given(stack, visitors):
    # Linux only, hence in a container: the thread that answers, and not one beside it, must
    # be seen to wait in fdatasync, which is system call 75 on x86-64 and 83 on arm64.
    program = """
import sys, time
while open(f"/proc/{sys.argv[1]}/syscall").read().split()[0] not in ("75", "83"):
    assert time.process_time() < 20, "Redis was never seen to wait for the disk"
"""
    with visitors() as seen:
        stack.as_root("redis", program)
    assert seen.harm == NO_HARM


def test_redis_killed_reads_all_back_without_a_complaint(stack):
    given = {key: stack.visit(key) for key in ("x", "y", "z")}
    stack.kill_9("redis")
    stack.up()
    assert {key: stack.visit(key) for key in given} == given
    assert stack.count() == given["z"]
    assert not re.search("CRITICAL|NOPERM", stack.compose("logs redis"))


def test_down_and_up_keep_the_count_and_down_v_does_not(stack):
    before = stack.visit()
    stack.compose("down")
    stack.up()
    assert stack.visit() == before + 1
    stack.compose("down -v")
    stack.up()
    assert stack.visit() == 1


def test_a_flood_of_keys_makes_redis_forget_the_oldest_and_count_on(stack):
    image = f"{stack.name}/counter-redis:1"
    options = docker("inspect -f", '{{join .Config.Cmd "\\n"}}', image).split("\n")
    options = [option.replace("256mb", "4mb") for option in options]
    redis = docker("run -d --rm", image, *options)
    program = """
import counter
for batch in range(100):
    keys = ["visits", *(f"visits:{batch}-{n}" for n in range(500))]
    numbers = counter.visits._ask("EVAL", counter.COUNT, 501, *keys)
print(numbers[-1], counter.visits.count("99-499"), counter.visits.total())
"""
    try:
        run = f"run --rm --network=container:{redis} {stack.test_image} python -c"
        assert docker(run, program) == "50000 50000 50000"
        assert docker(f"exec {redis} redis-cli get visits:0-0") == ""
    finally:
        docker("kill", redis)


# Promise 3: a visitor with a key may ask again.


def test_visitors_with_keys_are_counted_once_though_everything_crashes(stack, visitors):
    before = stack.count()
    with visitors(keys=True) as seen:
        crash(stack, ("redis", "web", "proxy"))
        stack.up()
    assert seen.harm[1:] == (0, 0)
    assert stack.count() - before == len(seen.numbers)


# Promise 4: only GET / counts.

A_VISIT = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
NO_VISITS = [
    ("HEAD / HTTP/1.0", 200, ""),
    ("GET /favicon.ico HTTP/1.0", 404, "Only / counts visits."),
    ("GET // HTTP/1.0", 404, "Only / counts visits."),
    ("POST / HTTP/1.0\nContent-Length: 5", 405, "Use GET or HEAD."),
    ("OPTIONS * HTTP/1.0", 405, "Use GET or HEAD."),
    ("GET / HTTP/1.1", 400, "The request has no Host."),
    ("GET http://x? HTTP/1.0", 400, "The request has no path."),
    ("GET / HTTP/1.1\nHost: x\nContent-Length: 5", 413, "A visit has no body."),
    ("GET / HTTP/1.1\nHost: x\nTransfer-Encoding: chunked", 413, "A visit has no body."),
    ("GET / HTTP/1.1\nHost: x\nContent-Length: 4294967296", 413, "A visit has no body."),
    ("GET / HTTP/1.0\nSec-Purpose: prefetch", 503, "A visit is not counted in advance."),
    ("GET / HTTP/1.0\nIdempotency-Key: " + "x" * 129, 400, "The key is over 128 characters."),
]  # fmt: skip


@pytest.mark.parametrize(("head", "status", "text"), NO_VISITS)
def test_what_is_no_visit_gets_one_line(stack, head, status, text):
    before = stack.count()
    body = (
        f"0\r\n\r\n{A_VISIT}"  # five bytes, which are also the last chunk, and a visit
    )
    request = head.replace("\n", "\r\n") + f"\r\nConnection: close\r\n\r\n{body}"
    head, _, body = stack.send(request.encode()).partition("\r\n\r\n")
    assert (int(head.split()[1]), body.strip()) == (status, text)
    assert stack.count() == before


def test_http_2_is_refused(stack):
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert stack.send(preface).startswith("HTTP/1.1 400")


def test_a_visit_may_name_the_host_in_its_target(stack):
    assert "Visit" in stack.send(
        b"GET http://x/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )


METHODS = ["GET", "GET", "GET", "GET", "HEAD", "POST", "OPTIONS", "CONNECT", "get"]
TARGETS = ["/", "/", "/", "//", "/%2F", "*", "x:1", "http://[x]?a", "/\xff", "/" * 9999]
VERSIONS = ["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", ""]
HEADERS = """Expect: 100-continue|Upgrade: h2c|Upgrade: websocket|Connection: Upgrade|X: \0
Content-Length: 5|Content-Length: 0|Content-Length: x|Transfer-Encoding: gzip|Trailer: X
Transfer-Encoding: chunked|Idempotency-Key: a|Idempotency-Key: \xff|Idempotency_Key: b
Host: [x|Host : x| folded|no colon|Range: bytes=0-1|Cookie: xxxx"""
BODIES = ["", "", "hello", "5\r\nhello\r\n0\r\n\r\n", "zz\r\n", A_VISIT]


def test_nothing_that_is_sent_harms_a_replica(stack, visitors):
    def hostile_request():
        lines = [f"{pick(METHODS)} {pick(TARGETS)} {pick(VERSIONS)}", "Host: x"]
        lines += [pick(headers) for _ in range(pick([0, 1, 1, 2, 3]))]
        return "\r\n".join([*lines, "Connection: close", "", pick(BODIES)])

    pick, headers = random.choice, re.split(r"[|\n]", HEADERS)
    half = A_VISIT[:-2]
    requests = [hostile_request() for _ in range(1500)] + [half] * 40
    counted, unfit = stack.count(), stack.unfit()
    with visitors(4) as seen, ThreadPoolExecutor(40) as pool:
        requests = [request.encode("latin-1") for request in requests]
        answers = list(pool.map(stack.send, requests))
    bad = [pair for pair in zip(requests, answers) if pair[1].startswith("HTTP/1.1 5")]
    assert (bad, stack.unfit() - unfit) == ([], 0)
    assert (seen.errors, seen.slowest < 1) == ({}, True)
    given = {int(visit[1]) for visit in VISIT.finditer("".join(answers))}
    assert stack.count() - counted == len(given | set(seen.numbers))


# Promise 5: neither a change nor a crash is an outage.


def test_without_redis_visitors_wait_8_seconds_and_read_why(stack):
    stack.compose("stop redis")
    began = time.monotonic()
    head, text = stack.get()
    waited = time.monotonic() - began
    stack.compose("up -d --wait redis")
    began = time.monotonic()
    stack.visit()
    assert time.monotonic() - began < 2
    assert head.startswith("HTTP/1.1 503")
    assert "content-type: text/plain\r\n" in head and "retry-after: 1\r\n" in head
    assert text == "No number for now. Please try again.\n"
    assert 7 < waited < 11


def test_32_replicas_share_the_visits(stack, visitors):
    stack.up(web=32)
    with visitors() as seen:
        time.sleep(4)
    assert seen.harm == NO_HARM
    assert len(seen.replicas) == 32


def test_stop_takes_5_seconds_at_most(stack):
    with socket.create_connection(("127.0.0.1", stack.port)):  # and never asks
        began = time.monotonic()
        stack.compose("stop")
        assert time.monotonic() - began < 5
    containers = stack.compose("ps -aq").split()
    codes = docker("inspect -f {{.State.ExitCode}}", *containers).split()
    assert codes == ["0"] * 5


# Promise 6: no more power than the job needs.


@pytest.mark.parametrize("service", ["proxy", "web", "redis"])
def test_a_service_has_no_more_power_than_it_needs(stack, service):
    status = stack.exec(service, "cat /proc/1/status")
    for line in (r"Uid:\s[1-9]", r"CapBnd:\s0+$", r"NoNewPrivs:\s1$"):
        assert re.search(f"^{line}", status, re.MULTILINE)
    stack.exec(service, "touch /tmp/file")
    assert stack.exec(service, "ls /tmp/file") == ""


COMMANDS = ["flushall", "set visits 1", "incrby x 1", "set x 1", "config get dir"]


@pytest.mark.parametrize("command", COMMANDS)
def test_redis_forbids(stack, command):
    assert "NOPERM" in stack.exec("redis", f"redis-cli {command}")


def test_only_the_proxy_is_published(stack):
    ports = stack.compose("ps --format {{.Ports}}")
    assert re.findall(r"\S+->\S+", ports) == [f"127.0.0.1:{stack.port}->5000/tcp"]


@pytest.mark.parametrize(("network", "answer"), [("data", "reached"), ("edge", "")])
def test_redis_is_reached_from_the_network_data_alone(stack, network, answer):
    program = (
        "import socket; socket.create_connection(('redis', 6379), 3); print('reached')"
    )
    run = f"run --rm --network {stack.name}_{network} {stack.test_image} python -c"
    assert docker(run, program, check=False) == answer


def test_redis_has_no_way_out(stack):
    routes = stack.exec("redis", "cat /proc/net/route")
    assert routes and not re.search(r"^\w+\s00000000\s", routes, re.MULTILINE)


# The same file on a Swarm.


def test_a_swarm_replaces_every_replica_and_harms_nobody(stack, visitors):
    make_swarm = docker("info -f {{.Swarm.ControlAvailable}}") != "true"
    stack.compose("down -v")
    # A kernel without IPVS has neither virtual addresses nor the port of all machines.
    trial = Path(stack.folder, "trial.yml")
    trial.write_text(f"""
services:
  redis: {{deploy: {{endpoint_mode: dnsrr}}}}
  proxy:
    deploy: {{endpoint_mode: dnsrr}}
    ports: [{{target: 5000, published: {stack.port}, mode: host}}]
""")
    files = f"-c {stack.folder}/compose.yml -c {trial}"
    tasks = f"ps -q --filter name=^{stack.name}_"
    if make_swarm:
        docker("swarm init --advertise-addr 127.0.0.1")
    try:
        docker(f"stack deploy --detach=true --resolve-image=never {files} {stack.name}")
        wait_until(lambda: docker(f"{tasks}proxy --filter health=healthy"))
        docker(f"service scale {stack.name}_web=3")
        with visitors() as seen:
            docker(f"service update --force --detach=false {stack.name}_web")
        assert seen.harm == NO_HARM
        assert len(seen.replicas) >= 6
    finally:
        docker(f"stack rm {stack.name}")
        wait_until(lambda: not docker(tasks))
        docker(f"volume rm {stack.name}_visits", check=False)
        if make_swarm:
            docker("swarm leave --force")
