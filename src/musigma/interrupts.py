"""Ctrl-C while the command line is still importing: it ends with code 130, and no traceback.

The imports take seconds, and come before any line of a command; so this is imported first. In
programs that are not the command line it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

__all__ = ["usual"]


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)


def _is_command() -> bool:
    """Whether this is `musigma`, or `python -m musigma`, whose name is yet to be known."""
    words = sys.argv or [""]
    name = sys.orig_argv[-len(words)] if words[0] == "-m" else words[0]
    return os.path.splitext(os.path.basename(name))[0] == "musigma"


def usual() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as in any program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)
