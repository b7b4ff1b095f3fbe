FROM redis:8-alpine
# Not root, but the user to whom /data belongs in the base image.
USER redis
# The server alone: the base image's own entry point would load four modules that nothing here uses.
ENTRYPOINT ["redis-server"]
# In this order:
# - Every write is on the disk (fsync) before its answer goes out, so snapshots (save) would add nothing.
# - When the memory is full, the keys that expire soonest are evicted: in a flood, visits are forgotten sooner. The
#   count never expires.
# - Other containers may connect without a password, but do only what follows --user. There, ~ is before keys that
#   they may touch, + before commands that they may give, and ( ) around a command with keys of its own.
#   ping is for the health check; get, incrby and eval count; set is for the keys of visits, and not for the count.
#   select, multi and exec: Redis before 8.4.4 (in an older image) checks its own file against this list, too (redis
#   issue 14545). It begins with a select; multi and exec enclose a script's writes, to be read all or not at all.
CMD [ \
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", \
    "--maxmemory", "256mb", "--maxmemory-policy", "volatile-ttl", \
    "--protected-mode", "no", \
    "--user", "default", "on", "nopass", "~visits", "~{visits}:*", \
        "+ping", "+get", "+incrby", "+eval", "+select", "+multi", "+exec", "(+set ~{visits}:*)"]
