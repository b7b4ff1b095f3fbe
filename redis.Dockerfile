FROM redis:8-alpine
# The image's entry point would step down to this user; started as it, the container needs no capability to do so.
USER redis
# Every write is on disk before its answer goes out (appendonly, appendfsync); a snapshot now and then (save) adds nothing.
# Anyone who reaches the port may count, and read the count, and nothing else.
CMD ["redis-server", \
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", \
    "--user", "default", "on", "nopass", "~visits*", "+ping", "+incrby", "+get"]
# -e: without it an error reply, as while the data is loading, would pass for health.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=0.5s CMD ["redis-cli", "-e", "ping"]
