FROM redis:8-alpine
# Not root, but the user to whom /data belongs in the base image.
USER redis
# The server alone, with the options of CMD: the base image's own entry point would load four modules besides.
ENTRYPOINT ["redis-server"]
CMD [ \
# Every write is in the append-only file, and on the disk (fsync), before its answer goes out. Those of a script are
# there together or not at all, so snapshots (save) would add nothing. Only what goes wrong is logged.
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--loglevel", "warning", \
# When the memory is full, the keys that expire soonest are evicted: visits are forgotten sooner, but never the count.
    "--maxmemory", "256mb", "--maxmemory-policy", "volatile-ttl", \
# Without protected mode, other containers need no password. They connect as the user default, who may use nothing but
# two kinds of keys (~) and these commands (+): ping for the health check; get, incrby and eval to count; set for the
# keys of visits alone, which the parentheses tie to it, and not for the count.
    "--protected-mode", "no", "--user", "default", "on", "nopass", "~visits", "~{visits}:*", \
        "+ping", "+get", "+incrby", "+eval", "(+set ~{visits}:*)", \
# Only Redis before 8.4.4, in an older image, needs these: it checks what scripts wrote to its file against this list,
# too (redis issue 14541). There, a select comes before the first write, and a del removes a key found expired.
        "+select", "(+del ~{visits}:*)"]
