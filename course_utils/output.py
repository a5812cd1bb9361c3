"""What compiled libraries print past Python's own streams."""

import contextlib
import ctypes
import os
import sys
import tempfile


@contextlib.contextmanager
def captured(descriptor):
    """Keep what is printed to a file descriptor (1: output, 2: errors) away; yield a list that holds the text on leaving."""
    text = []
    _flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(descriptor)
        os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            _flush()
            os.dup2(before, descriptor)
            os.close(before)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def _flush():
    sys.stdout.flush()
    sys.stderr.flush()
    # C has a buffer of its own for what it prints. On Windows there is no such handle, and its runtime prints at once.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
