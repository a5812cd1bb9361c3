"""Write down every attempt to reach another machine, in each Python process of a run: `make offline` puts this folder first.

Python imports a module of this name at its start. Its audit hook sees connections and look-ups of all libraries that use
Python's sockets; what other code does, the missing network stops.
"""

import os
import socket
import sys

HERE = {"", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()}
EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def is_here(address):
    """Return whether a socket's address, a host's name or None means this machine; a path is a socket of its own."""
    host = address[0] if isinstance(address, tuple) and address else address
    host = host.decode(errors="replace") if isinstance(host, bytes) else host
    return (
        not isinstance(address, tuple)
        and str(host).startswith(("/", "\0"))
        or (host is None or str(host) in HERE or str(host).startswith(("127.", "::ffff:127.")))
    )


def _watch(event, args):
    if event in EVENTS and not is_here(args[EVENTS[event]]):
        with open(os.environ["COURSE_OUTSIDE"], "a") as file:
            file.write(f"{event} {args[EVENTS[event]]!r} by {' '.join(sys.orig_argv[:4])}\n")


if "COURSE_OUTSIDE" in os.environ:
    sys.addaudithook(_watch)
