FROM haproxy:3.2-alpine
# The base image runs it as the user haproxy, not as root.
COPY --chown=haproxy haproxy.cfg /usr/local/etc/haproxy/
# A mistake in the file stops the build with a message.
RUN haproxy -c -f /usr/local/etc/haproxy/haproxy.cfg
# Without stderr, where HAProxy repeats each event of its log as a warning, and adds good news, such as "is UP".
CMD ["sh", "-c", "exec haproxy -f /usr/local/etc/haproxy/haproxy.cfg 2>/dev/null"]
