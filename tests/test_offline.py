"""The watcher of `make offline` sees who reaches out, and nobody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("offline")


def outside(tmp_path, code):
    """Run `code` in a process that is watched; return what was written down."""
    log = tmp_path / "outside.txt"
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "COURSE_OUTSIDE": str(log)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("attempt", "named"),
    [
        ("socket.create_connection(('192.0.2.1', 80), 0.01)", "192.0.2.1"),  # an address that is kept for documentation
        ("socket.getaddrinfo('example.invalid', 443)", "example.invalid"),
        ("socket.gethostbyname('example.invalid')", "example.invalid"),
        ("__import__('urllib.request').request.urlopen('http://example.invalid/a')", "example.invalid"),
    ],
)
def test_an_attempt_is_written_down_even_when_its_error_is_swallowed(tmp_path, attempt, named):
    code = f"import socket\ntry:\n    {attempt}\nexcept OSError:\n    pass"
    assert named in outside(tmp_path, code)


def test_what_stays_on_this_machine_is_not(tmp_path):
    code = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
socket.getaddrinfo("localhost", 80)
socket.gethostbyname(socket.gethostname())
one, other = socket.socketpair()
"""
    assert outside(tmp_path, code) == ""
