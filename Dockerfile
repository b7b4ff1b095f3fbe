# What the image of web and the image of the tests share.
FROM python:3.14-slim AS base
WORKDIR /app
# Before the source, so that a change to the source does not install the packages again.
COPY requirements.txt .

# The tests: docker build --load -t counter-test --target test . && docker run --rm counter-test
FROM base AS test
# The tests start a Redis of their own, in the version that Debian has.
RUN apt-get update \
 && apt-get install -y --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/*
# --no-deps installs nothing that is not listed, and pip check makes sure that nothing is missing.
RUN pip install --no-cache-dir --no-deps -r requirements.txt && pip check
COPY --chown=1000:1000 counter.py test_counter.py ./
USER 1000:1000
# Without pytest's cache, since this user may not write here. A test that hangs ends the run.
CMD ["pytest", "-p", "no:cacheprovider", \
    "-o", "faulthandler_timeout=60", "-o", "faulthandler_exit_on_timeout=true"]

# The counter. It is the last stage, so that a plain `docker build .` makes it.
FROM base AS web
# Only the two packages that it needs, in the versions that the tests ran with.
RUN pip install --no-cache-dir --no-deps -c requirements.txt redis waitress && pip check
# With --chown, so that the user below can read it under umask 077, too.
COPY --chown=1000:1000 counter.py .
# Not root. Any number will do, if --chown has it, too.
USER 1000:1000
CMD ["python", "counter.py"]
