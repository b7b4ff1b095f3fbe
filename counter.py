"""A visit counter: a WSGI callable, served by Waitress, that adds to a number in Redis."""

import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import deque

import redis
import waitress
from redis.backoff import NoBackoff
from redis.retry import Retry

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
VISITS_KEY = os.environ.get("VISITS_KEY", "visits")
PORT = os.environ.get("PORT", "5000")
REPLICA = socket.gethostname()  # in a container its short id: balancing can be seen

waiting = deque()  # visits that no INCRBY has taken yet
turn = threading.Lock()  # held by the visit that counts for all that wait
failed_at, failure = 0.0, ""  # when Redis last failed, in seconds since 1970, and how
stopping = threading.Event()


def connect(url):
    """Return a client of the Redis at `url`; exits with 1 if none could ever be there."""
    try:
        client = redis.Redis.from_url(
            url,
            # A call can connect twice, a visit wait for two calls: 2 * (2 * 0.25 + 1) s.
            socket_connect_timeout=0.25,
            socket_timeout=1,
            # A retry adds its wait, and after a lost reply counts twice (redis-py issue 261).
            retry=Retry(NoBackoff(), 0),
            # No greetings: each is a round trip more, and a command more to allow.
            protocol=2,
            driver_info=None,
        )
        # These two would otherwise fail only with the first visit.
        client.connection_pool.make_connection()
        client.connection_pool.connection_kwargs.get("host", "").encode("idna")
    except (redis.RedisError, TypeError, ValueError):
        # Without the reason, which may quote a password.
        sys.exit("counter: REDIS_URL must be like redis://localhost:6379")
    return client


store = connect(REDIS_URL)
connection = store.connection_pool.make_connection()  # for the holder of `turn` alone
answered = 0.0  # when it last brought an answer, in seconds of the monotonic clock


def take():
    """Return the visits that wait, as a list; for the holder of `turn` alone."""
    return [waiting.popleft() for _ in range(len(waiting))]


def count():
    """Number the visits that wait by one INCRBY; raises what Redis fails with."""
    global connection, answered, failed_at, failure
    # Threads that wait for this core, and are about to bring a visit, go first.
    os.sched_yield()
    visits = take()
    try:
        # The pool replaces a dead connection; to look costs a lone visitor a tenth of the
        # speed, and in less than 10 ms no Redis goes and comes back.
        if time.monotonic() > answered + 0.01:
            store.connection_pool.release(connection)
            connection = store.connection_pool.get_connection()
        connection.send_command("INCRBY", VISITS_KEY, len(visits))
        last = connection.read_response()
        answered = time.monotonic()
        for number, visit in enumerate(visits, last - len(visits) + 1):
            visit.append(number)
    except Exception as error:
        failed_at, failure = time.time(), str(error)
        for visit in visits + take():
            visit.append(failure)
        raise


def number_visit(arrived):
    """Return the number, from 1 up, of a visit that arrived at `arrived`, in Unix time.

    Raises redis.RedisError if Redis gave none; the visit was then counted once at most.
    """
    if arrived < failed_at:
        # It queued while Redis failed; one more attempt would hold up those behind it.
        raise redis.RedisError(failure)
    visit = []  # its number goes in, or what kept it from one
    waiting.append(visit)
    # Visits that arrive during one INCRBY share the next (a group commit).
    with turn:
        if not visit:
            count()
    if isinstance(visit[0], str):
        raise redis.RedisError(visit[0])
    return visit[0]


def respond(method, path, arrived):
    """Return the status, text and particular headers for a request; raises nothing."""
    try:
        match path, method:
            case "/", "GET":
                number = number_visit(arrived)
                return "200 OK", f"Visit {number}, served by {REPLICA}", []
            case "/", "HEAD":
                number = int(store.get(VISITS_KEY) or 0) + 1
                return "200 OK", f"Visit {number}, served by {REPLICA}", []
            case "/health", "GET" | "HEAD":
                return "200 OK", "serving", []
            case "/ready", "GET" | "HEAD" if stopping.is_set():
                # HAProxy then sends nothing new here (http-check disable-on-404).
                return "404 Not Found", "stopping", []
            case "/ready", "GET" | "HEAD":
                store.ping()
                return "200 OK", "ready", []
            case "/" | "/health" | "/ready", _:
                allow = [("Allow", "GET, HEAD")]
                return "405 Method Not Allowed", "use GET or HEAD", allow
            case _:
                return "404 Not Found", "visits are counted at / alone", []
    except (redis.RedisError, ValueError) as error:
        wait = [("Retry-After", "1")]
        return "503 Service Unavailable", f"Redis failed: {error}", wait


def app(environ, start_response):
    """Return the body of the answer to a request, as WSGI (PEP 3333) has it."""
    method = environ["REQUEST_METHOD"]
    # As it was sent: in PATH_INFO, Waitress takes // and /%2F for /.
    path = environ.get("REQUEST_URI", environ["PATH_INFO"]).partition("?")[0]
    # When Waitress read the request, which may since have waited for a thread.
    channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
    arrived = channel.last_activity if channel else time.time()
    status, text, headers = respond(method, path, arrived)
    body = f"{text}\n".encode()
    headers += [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    ]
    start_response(status, headers)
    return [] if method == "HEAD" else [body]


def main():
    """Serve until SIGTERM or Ctrl-C, and answer every visit in flight before the end."""
    # Blocked before a thread starts, to be waited for; PID 1 would ignore them unhandled.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    # The interpreter lock lets one thread run at a time: on one core they hand it over
    # without waking another, for up to half as many visits a second again under load.
    # Which core is left to chance, so that replicas spread.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    # It warns of every request that waits for a thread (waitress issue 309).
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        address = "", int(PORT)
        listener = socket.create_server(address, family=family, dualstack_ipv6=dual)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"counter: PORT cannot be {PORT!r}: {error}")
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=16,  # as many visits share an INCRBY; more gain little
        send_bytes=18000,  # above any answer: the main loop sends it, threads do not
        connection_limit=2000,
        asyncore_use_poll=True,  # select() ends at file descriptor 1,024
        max_request_body_size=1024,  # a large body needs a disk, and there is none
        clear_untrusted_proxy_headers=False,  # none is read, and looking costs time
        ident=None,
    )
    threading.Thread(target=server.run, daemon=True).start()
    place = dict(connection.repr_pieces())
    port = listener.getsockname()[1]
    print(f"Serving on port {port}, counting {VISITS_KEY} in Redis {place}", flush=True)
    if signal.sigwait(signals) == signal.SIGTERM:
        stopping.set()
        time.sleep(1.5)  # the proxy asks /ready twice a second
    server.task_dispatcher.shutdown()
    # The threads are done; the main loop may still be sending their answers.
    while any(each.total_outbufs_len for each in list(server.active_channels.values())):
        time.sleep(0.01)


if __name__ == "__main__":
    main()
