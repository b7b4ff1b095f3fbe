FROM redis:8-alpine
# Not root, but the user to whom /data belongs in the base image.
USER redis
# The server alone: the base image's own entry point would load four modules that nothing here uses.
ENTRYPOINT ["redis-server"]
# In this order:
# - Every write is on the disk (fsync) before its answer goes out, so snapshots (save) would add nothing.
# - When the memory is full, keys that expire are evicted: in a flood, they are forgotten sooner.
# - Other containers may connect without a password, because what follows --user says what they may do:
#   ping for the health check; get, incrby and eval to count; set for the keys of visits, and not for the count.
#   Redis before 8.4.4 checks its own file against this list, too (redis issue 14545). It begins with a
#   select, and a script's writes stand between multi and exec, so that they are read all or not at all.
CMD [ \
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", \
    "--maxmemory", "256mb", "--maxmemory-policy", "volatile-ttl", \
    "--protected-mode", "no", \
    "--user", "default", "on", "nopass", "~visits", "~{visits}:*", \
        "+ping", "+get", "+incrby", "+eval", "+select", "+multi", "+exec", "(+set ~{visits}:*)"]
