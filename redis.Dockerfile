FROM redis:8-alpine
# Not root, but the user to whom /data belongs in the base image.
USER redis
# The server alone, with the options of CMD: the base image's own entry point would also load four modules.
ENTRYPOINT ["redis-server"]
CMD [ \
# Before Redis answers, what it wrote is in its append-only file and on the disk (fsync), that of a script as a whole
# or not at all. Snapshots (save) would add nothing to that. Only what goes wrong is logged.
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--loglevel", "warning", \
# When the memory is full, the keys that expire soonest are evicted: visits are forgotten sooner, but never the count.
    "--maxmemory", "256mb", "--maxmemory-policy", "volatile-ttl", \
# Without protected mode, other containers need no password. They connect as the user default, who may use nothing but
# two kinds of keys (~) and these commands (+): ping for the health check; get, incrby and eval to count; and, by the
# parentheses, set for the keys of visits alone, and not for the count.
    "--protected-mode", "no", "--user", "default", "on", "nopass", "~visits", "~{visits}:*", \
        "+ping", "+get", "+incrby", "+eval", "(+set ~{visits}:*)", \
# Only Redis before 8.4.4, if your image is older, needs these: what it reads back from its file must be on this list,
# too (redis issue 14541). In the file, select comes before the first write, and del removes a key found expired.
        "+select", "(+del ~{visits}:*)"]
