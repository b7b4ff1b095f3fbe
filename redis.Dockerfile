FROM redis:8-alpine
# Not root, but the user to whom /data belongs in the base image.
USER redis
# The server alone, with the options of CMD: the base image's own entry point would also load four modules.
ENTRYPOINT ["redis-server"]
CMD [ \
# Redis answers only when what it wrote is in its append-only file and on the disk (fsync). What a script wrote is there
# as a whole, or not at all. Snapshots (save) would add nothing to that. Only what goes wrong is logged.
    "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--loglevel", "warning", \
# If the memory is full, the keys that expire soonest go: visits are forgotten sooner. The count stays.
    "--maxmemory", "128mb", "--maxmemory-policy", "volatile-ttl", \
# Without protected mode, other containers need no password. They connect as the user default, who may use nothing but
# two kinds of keys (~) and these commands (+): ping for the health check; get, incrby and eval to count; and, by the
# parentheses, set for the keys of visits alone, and not for the count.
    "--protected-mode", "no", "--user", "default", "on", "nopass", "~visits", "~{visits}:*", \
        "+ping", "+get", "+incrby", "+eval", "(+set ~{visits}:*)", \
# Redis before 8.4.4, in an older image, checks its own file against this list (redis issue 14541). The file has the
# script's commands, select before the first, and del for a key that has expired.
        "+select", "(+del ~{visits}:*)"]
