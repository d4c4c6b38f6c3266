"""Ctrl-C that lets the step in hand end, so that its state can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(RuntimeError):
    """The user has stopped the run; what there was is written."""


@contextmanager
def first_interrupt_waits() -> Iterator[Callable[[], bool]]:
    """Let the first SIGINT set a flag, and the second one interrupt as always.

    Returns:
        Whether there was one. In a thread that gets no signals there never is.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
