FROM haproxy:3.2-alpine
COPY --chown=haproxy haproxy.cfg /usr/local/etc/haproxy/
