"""A visit counter: a WSGI callable that counts in Redis, served by Waitress.

A visit that got no answer may be tried again under the same idempotency key: Redis
remembers which number each key got, so every visit is still counted once."""

import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import redis
import waitress

# A script in Lua. Meanwhile, Redis does nothing else, and if it dies, nothing of this stays.
# It returns a number for each visit of a batch, and remembers it for a minute. KEYS[1] is the
# key of the count. Then comes one for each visit. A HEAD, which only reads, has KEYS[1] again.
COUNT = """
local numbers = {}
for i = 2, #KEYS do
  local number = redis.call('GET', KEYS[i])  -- a text, or false if there is none
  if KEYS[i] == KEYS[1] then
    numbers[i - 1] = (number or 0) + 1  -- an error if the text is no number
  else
    numbers[i - 1] = tonumber(number) or redis.call('INCRBY', KEYS[1], 1)
    redis.call('SET', KEYS[i], numbers[i - 1], 'EX', 60)
  end
end
return numbers
"""


class Counter:
    """Counts visits in the Redis at `url`, for any number of threads at once.

    While the executor's only thread counts a batch, new visits gather in the next one."""

    def __init__(self, url):
        # Only the executor's thread may use it. It connects when used, and anew after any error
        # but a reply of Redis, so that a late answer is never taken for the next one.
        self._connection = redis.ConnectionPool.from_url(
            url,
            retry=None,  # since the proxy retries
            socket_connect_timeout=0.25,  # seconds. Even a Redis that hangs accepts at once.
            socket_timeout=2.5,  # for two syncs of a slow disk: the last batch's, and ours
            protocol=2,  # Without this, a new connection would wait for HELLO first,
            driver_info=None,  # and without this, for CLIENT, which our Redis forbids.
        ).make_connection()
        self._executor = ThreadPoolExecutor(max_workers=1)
        # The batch that gathers: its keys, and the future that will have its numbers.
        self._keys, self._numbers, self._lock = [], None, threading.Lock()

    def number(self, key=None):
        """Return the number, from 1 up, of the visit with this key. Without a key, count
        nothing, and return the number that the next visit would get. Raises redis.RedisError if
        Redis gives none; it may have counted the visit nevertheless."""
        with self._lock:
            if not self._keys:  # A batch begins. It is counted when the thread is free.
                self._numbers = self._executor.submit(self._count_batch)
            place, numbers = len(self._keys), self._numbers  # in this batch
            # The braces keep all keys on one node, if Redis is a cluster.
            self._keys.append("visits" if key is None else f"{{visits}}:{key}")
        return numbers.result()[place]  # waits, without the lock, or raises its error

    def _count_batch(self):
        give_way()
        with self._lock:  # from here on, visits join the next batch
            keys, self._keys = self._keys, []
        try:
            # EVAL takes a script, the number of keys, the keys, and other data (here none).
            self._connection.send_command("EVAL", COUNT, 1 + len(keys), "visits", *keys)
            return self._connection.read_response()
        except redis.RedisError as error:
            logging.getLogger("counter").error("Redis failed: %s", error)
            raise


def create_app(url=None):
    """Return the WSGI callable (PEP 3333) that counts in the Redis at `url`, or else at
    REDIS_URL. Raises ValueError (without the password) if that is malformed."""
    try:
        counter = Counter(url or os.environ.get("REDIS_URL", "redis://localhost:6379"))
    except (AttributeError, TypeError, ValueError, redis.RedisError):
        raise ValueError("REDIS_URL must be like redis://localhost:6379") from None
    host = socket.gethostname()  # in a container, its short id

    def app(environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        # The proxy gives every visit a key; one that comes without the proxy may have none.
        key = environ.get("HTTP_IDEMPOTENCY_KEY") or str(uuid.uuid4())
        headers = [("Content-Type", "text/plain"), ("Cache-Control", "no-store")]
        try:
            match method, path:
                case "GET", "/" if len(key) > 128:  # since Redis has to remember it
                    status, text = "400 Bad Request", "The key is over 128 characters."
                case "GET" | "HEAD", "/":  # A HEAD gets the headers of the next visit.
                    number = counter.number(key if method == "GET" else None)
                    status, text = "200 OK", f"Visit {number}, served by {host}"
                case "GET" | "HEAD", "/health":
                    status, text = "200 OK", "serving"
                case "GET" | "HEAD", _:
                    status, text = "404 Not Found", "Only / counts visits."
                case _:
                    status, text = "405 Method Not Allowed", "Use GET or HEAD."
                    headers.append(("Allow", "GET, HEAD"))
        except redis.RedisError:
            time.sleep(0.25)  # so that the proxy's 32 retries last for 8 seconds
            status, text = "503 Service Unavailable", "No number yet. Please try again."
            headers.append(("Retry-After", "1"))
        body = f"{text}\n".encode()
        headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [] if method == "HEAD" else [body]

    return app


# This and the end of `main` are for speed alone. While the thread gives way, more visits join
# the batch. (Without it, 64 clients get only 0.79 times as many visits a second.)
give_way = getattr(os, "sched_yield", lambda: None)


def main():
    """Serve until SIGTERM or Ctrl-C; exit with one line if a setting cannot work."""
    logging.basicConfig(format="%(name)s: %(message)s")
    # Waitress would warn of each request that waits for a thread (waitress issue 309).
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # Linux ignores a signal for which a container's first process has no handler. At exit,
    # Waitress finishes the visits under way, but does not answer all: the proxy tries again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    port = os.environ.get("PORT", "5000")
    try:
        server = socket.create_server(("", int(port)))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"counter: PORT cannot be {port!r}: {error}")
    try:
        app = create_app()
    except ValueError as error:
        sys.exit(f"counter: {error}")
    print(f"counter: serving on port {server.getsockname()[1]}", flush=True)
    # Python runs one thread at a time, and switches faster on one core. (Without: 0.74 times.)
    if hasattr(os, "sched_setaffinity"):  # on Linux alone
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    # send_bytes lets one thread send all answers. (Without: 0.81. With 16 threads: 0.94.)
    waitress.serve(app, sockets=[server], threads=32, send_bytes=18000)


if __name__ == "__main__":
    main()
