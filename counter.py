"""A visit counter: a WSGI callable that counts in Redis, served by Waitress.

A visit that got no answer may be tried again under the same idempotency key: Redis
remembers which number each key got, so every visit is still counted once.
"""

import logging
import os
import random
import signal
import socket
import sys
import threading
import uuid
from concurrent.futures import Future
from http.client import responses

import redis
import waitress

log = logging.getLogger("counter")
# For speed (1.3 times): lets other threads run, and add their visits. (Not on Windows.)
give_way = getattr(os, "sched_yield", lambda: None)

# A script in Lua, which Redis runs as a whole: no other visit and no crash can cut in.
# KEYS[1] holds the count, and every other key a visit's number, for a minute after its last
# use. /ready runs the script without a visit, and it must fail if one could not be counted:
# `#!lua` makes Redis refuse it if out of memory or a read-only replica, and the asserts
# fail if the access list forbids what a visit needs.
COUNT = """#!lua
assert(redis.acl_check_cmd('INCRBY', KEYS[1], 1), 'INCRBY is not allowed')
assert(redis.acl_check_cmd('SET', '{' .. KEYS[1] .. '}:', 1), 'SET is not allowed')
local numbers = {redis.call('GET', KEYS[1]) or 0}
for i = 2, #KEYS do
  numbers[i] = redis.call('GET', KEYS[i]) or redis.call('INCRBY', KEYS[1], 1)
  redis.call('SET', KEYS[i], numbers[i], 'EX', 60)
end
return numbers
"""


class Counter:
    """Counts visits in the Redis at `url`, for any number of threads at once.

    While one command counts, the visits that arrive gather in a batch. The first of them
    counts all of it with the next command, and the others wait for the reply."""

    def __init__(self, url):
        self._redis = redis.Redis.from_url(
            url,
            retry=None,  # since the proxy retries
            socket_connect_timeout=0.25,
            socket_timeout=2.5,  # a slow disk syncs for 1.2 s: first for others, then for us
            protocol=2,  # without HELLO, which our Redis forbids
            driver_info=None,  # without CLIENT, which it forbids, too
        )
        # Does not connect yet, but raises an error if an option in the URL is wrong.
        self._redis.connection_pool.make_connection()
        self._batch = ["visits"], Future()  # the script's KEYS, and its reply
        self._batch_lock = threading.Lock()
        self._turn = threading.Lock()  # held by the visit that counts a batch

    def count(self, key):
        """Return the number, from 1 up, of the visit with this idempotency key.

        Raises redis.RedisError if Redis gives none; it may have counted the visit."""
        with self._batch_lock:
            keys, reply = self._batch
            place = len(keys)
            keys.append(f"{{visits}}:{key}")  # {}: one node, if Redis is a cluster
        if place == 1:  # the first visit of a batch counts all of it
            with self._turn:  # waits until the batch before is counted
                give_way()
                with self._batch_lock:  # from here on, visits join the next batch
                    self._batch = ["visits"], Future()
                try:
                    reply.set_result(self._run_script(keys))
                except BaseException as error:  # all of the batch must hear of it
                    reply.set_exception(error)
        return int(reply.result()[place])  # the others wait here

    def total(self):
        """Return how many visits were counted; raises redis.RedisError as `count` would."""
        return int(self._run_script(["visits"])[0])

    def _run_script(self, keys):
        try:
            return self._redis.execute_command("EVAL", COUNT, len(keys), *keys)
        except redis.RedisError as error:
            log.warning("Redis failed: %s", error)
            raise


def create_app(counter):
    """Return the WSGI callable (PEP 3333) that counts visits with `counter`."""
    host = socket.gethostname()  # in a container, its short id

    def app(environ, start_response):
        method = environ["REQUEST_METHOD"]
        # The path as it was sent: in PATH_INFO, Waitress turns // and /%2F into /.
        path = environ.get("REQUEST_URI", environ["PATH_INFO"]).partition("?")[0]
        # The proxy gives every visit a key; one that comes without the proxy may have none.
        key = environ.get("HTTP_IDEMPOTENCY_KEY") or str(uuid.uuid4())
        headers = [("Content-Type", "text/plain"), ("Cache-Control", "no-store")]
        try:
            match method, path:
                case "GET", "/" if len(key) > 128:  # since Redis has to remember it
                    status, text = 400, "The key is over 128 characters."
                case "GET", "/":
                    status, text = 200, f"Visit {counter.count(key)}, served by {host}"
                case "HEAD", "/":  # the headers that a GET would have
                    status, text = 200, f"Visit {counter.total() + 1}, served by {host}"
                case "GET" | "HEAD", "/health":
                    status, text = 200, "serving"
                case "GET" | "HEAD", "/ready":
                    counter.total()
                    status, text = 200, "ready"
                case "GET" | "HEAD", _:
                    status, text = 404, "Only / counts visits."
                case _:
                    status, text = 405, "Use GET or HEAD."
                    headers.append(("Allow", "GET, HEAD"))
        except (redis.RedisError, ValueError):  # the count in Redis may be no number
            status, text = 503, "No number for now. Please try again."
            headers.append(("Retry-After", "1"))
        body = f"{text}\n".encode()
        headers.append(("Content-Length", str(len(body))))
        start_response(f"{status} {responses[status]}", headers)
        return [] if method == "HEAD" else [body]

    return app


def main():
    """Serve until SIGTERM or Ctrl-C; exit with one line if a setting cannot work."""
    logging.basicConfig(format="%(name)s: %(message)s")
    # Waitress would warn of each request that waits for a thread (waitress issue 309).
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # Linux ignores a signal for which the first process of a container has no handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        counter = Counter(os.environ.get("REDIS_URL", "redis://localhost:6379"))
    except Exception:  # not shown, since it may quote a password
        sys.exit("counter: REDIS_URL must be like redis://localhost:6379")
    port = os.environ.get("PORT", "5000")
    try:
        server = socket.create_server(("", int(port)))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"counter: PORT cannot be {port!r}: {error}")
    # For speed (1.8 times): Python runs one thread at a time, and one core switches faster.
    if hasattr(os, "sched_setaffinity"):  # only on Linux
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    print(f"counter: serving on port {server.getsockname()[1]}", flush=True)
    # For speed: 16 threads are 0.8 times as fast, and 64 are 0.9 times. With send_bytes (18000
    # is its old default), one thread sends; with today's, all do, and hinder each other: 0.6.
    waitress.serve(create_app(counter), sockets=[server], threads=32, send_bytes=18000)


if __name__ == "__main__":
    main()
