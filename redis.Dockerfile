FROM redis:8-alpine
# The image's entry point would step down to this user; started as it, the container
# needs no capability to do so. By name, since its number is the base image's affair.
# hadolint ignore=DL3066
USER redis
# Every write is on disk before its answer goes out (appendonly, appendfsync), so that
# snapshots (save) would add nothing. Whoever reaches the port may count and read the
# count: no other command, no other key.
CMD ["redis-server", \
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", \
    "--user", "default", "on", "nopass", "~visits*", "+ping", "+incrby", "+get"]
# -e: without it an error reply, as while the data is loading, would pass for health.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --start-interval=0.5s \
    CMD ["redis-cli", "-e", "ping"]
