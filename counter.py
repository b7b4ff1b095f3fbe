"""A visit counter: the WSGI callable `app` counts in Redis, and Waitress serves it.

A visit goes down from `app` to `Visits.count` to Redis, and comes back up as a number or
as an exception. A visit that got no answer may be tried again under the same idempotency
key: Redis remembers which number each key got, so every visit is still counted once.
"""

import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from concurrent.futures import Future

import redis
import waitress

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
PORT = os.environ.get("PORT", "5000")
REPLICA = socket.gethostname()  # in a container, its short id
log = logging.getLogger("counter")

# Gives each key the number that it already has, or else the next one, and remembers it
# for a minute. Redis runs a script as a whole: no other visit and no crash can cut in.
COUNT = """
local numbers = {}
for i = 2, #KEYS do
  local number = redis.call('GET', KEYS[i])
  if not number then
    number = redis.call('INCRBY', KEYS[1], 1)
    redis.call('SET', KEYS[i], number, 'EX', 60)
  end
  numbers[i - 1] = tonumber(number)
end
return numbers
"""


class Visits:
    """The visits counted in the Redis at `url`, for any number of threads at once."""

    def __init__(self, url):
        self._redis = redis.Redis.from_url(
            url,
            # Less than 3 s in all, with the 1 s that compose.yml allows to look up its name.
            socket_connect_timeout=0.25,
            socket_timeout=1,
            # The proxy tries again; a retry here would only make visits wait longer.
            retry=None,
            # By default, redis-py sends HELLO and CLIENT, which our Redis forbids.
            protocol=2,
            driver_info=None,
        )
        # A wrong option in the URL would otherwise show only at the first visit.
        self._redis.connection_pool.make_connection()
        self._waiting = deque()  # (key, future number) of visits not yet sent to Redis
        self._lock = threading.Lock()  # held while a command counts visits
        self._pause_end = 0.0  # in seconds of time.monotonic()

    def count(self, key):
        """Return the number, from 1 up, of the visit with this idempotency key.

        Raises redis.RedisError if Redis gives none; it may have counted the visit."""
        number = Future()
        self._waiting.append((key, number))
        # Visits that arrive while one command runs share the next one: a group commit.
        with self._lock:
            if not number.done():
                self._count_waiting()
        return number.result()

    def total(self):
        """Return how many visits were counted; raises redis.RedisError if Redis fails."""
        return int(self._ask("GET", "visits") or 0)

    def _count_waiting(self):
        # For speed (1.2 times): let threads that are about to bring a visit run first.
        os.sched_yield()
        visits = [self._waiting.popleft() for _ in range(len(self._waiting))]
        keys = ["visits", *(f"visits:{key}" for key, _ in visits)]
        try:
            # A circuit breaker: without it, visits wait for one time-out after another.
            if time.monotonic() < self._pause_end:
                raise redis.ConnectionError("Redis failed less than 0.5 s ago")
            numbers = self._ask("EVAL", COUNT, len(keys), *keys)
            answers = list(zip(visits, numbers, strict=True))
        except Exception as error:
            for _, future in visits:
                future.set_exception(error)
            raise
        for (_, future), number in answers:
            future.set_result(number)

    def _ask(self, *command):
        try:
            reply = self._redis.execute_command(*command)
        except Exception as error:
            log.warning("Redis failed: %s", error)
            self._pause_end = time.monotonic() + 0.5
            raise
        self._pause_end = 0.0
        return reply


try:
    visits = Visits(REDIS_URL)
except (AttributeError, TypeError, ValueError, redis.RedisError):  # may quote secrets
    sys.exit("counter: REDIS_URL must be like redis://localhost:6379")


def app(environ, start_response):
    """Return the body of the answer to a request, as a WSGI callable does (PEP 3333)."""
    method = environ["REQUEST_METHOD"]
    # The path as it was sent: in PATH_INFO, Waitress turns // and /%2F into /.
    path = environ.get("REQUEST_URI", environ["PATH_INFO"]).partition("?")[0]
    # The proxy gives every visit a key; one that comes without the proxy may have none.
    key = environ.get("HTTP_IDEMPOTENCY_KEY") or str(uuid.uuid4())
    headers = [("Content-Type", "text/plain"), ("Cache-Control", "no-store")]
    try:
        match method, path:
            case "GET", "/" if len(key) > 128:
                status, text = "400 Bad Request", "The key is over 128 characters."
            case "GET" | "HEAD", "/":
                # HEAD has the headers of the next visit, and is not counted.
                number = visits.count(key) if method == "GET" else visits.total() + 1
                status, text = "200 OK", f"Visit {number}, served by {REPLICA}"
            case "GET" | "HEAD", "/health":
                status, text = "200 OK", "serving"
            case "GET" | "HEAD", "/ready":
                visits.total()
                status, text = "200 OK", "ready"
            case "GET" | "HEAD", _:
                status, text = "404 Not Found", "Only / counts visits."
            case _:
                status, text = "405 Method Not Allowed", "Use GET or HEAD."
                headers.append(("Allow", "GET, HEAD"))
    except (redis.RedisError, ValueError):  # the count in Redis may be no number
        status, text = "503 Service Unavailable", "No number for now. Please try again."
        headers.append(("Retry-After", "1"))
    body = f"{text}\n".encode()
    start_response(status, [*headers, ("Content-Length", str(len(body)))])
    return [] if method == "HEAD" else [body]


def main():
    """Serve until SIGTERM or Ctrl-C, then return."""
    logging.basicConfig(format="%(name)s: %(message)s")
    # Waitress would warn of each request that waits for a thread (waitress issue 309).
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # Linux ignores a signal for which the first process of a container has no handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # For speed (1.4 times): one thread runs at a time, so they hand over best on one core.
    if hasattr(os, "sched_setaffinity"):  # not on a Mac
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    try:
        listener = socket.create_server(("", int(PORT)))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"counter: PORT cannot be {PORT!r}: {error}")
    print(f"counter: serving on port {listener.getsockname()[1]}", flush=True)
    waitress.serve(
        app,
        sockets=[listener],
        threads=32,  # up to 32 visits share a command; more threads gain nothing
        clear_untrusted_proxy_headers=False,  # nothing reads them; 3 % less CPU time
        send_bytes=18000,  # more than any answer, so that only the main loop sends
    )


if __name__ == "__main__":
    main()
