"""The lock of a net: one caller at a time, in turn, and fresh ones in a forked child."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_locks: weakref.WeakSet[NetLock] = weakref.WeakSet()


class NetLock:
    """A re-entrant lock that a long training hands over between two slices.

    Python's lock goes to whoever asks first after its release, which is the training again: it holds the interpreter.
    So whoever finds the lock taken waits for it with ``_turn`` in his hands, and `give_way` takes ``_turn`` before it
    takes the lock back. ``quick`` is the lock itself, for calls of a microsecond while nothing trains. ``depth`` counts
    what its holder says is under way; a child that is forked by another thread begins with 0.
    """

    def __init__(self) -> None:
        self.quick, self._turn, self.depth = threading.RLock(), threading.Lock(), 0
        _locks.add(self)

    def __enter__(self) -> None:
        if not self.quick.acquire(blocking=False):
            with self._turn:
                self.quick.acquire()

    def __exit__(self, *_: Any) -> None:
        self.quick.release()

    def give_way(self) -> None:
        """Let those who wait go first. The caller holds the lock once."""
        self.quick.release()
        try:
            with self._turn:  # whoever waits has it until the lock is his
                pass
        finally:  # an interrupt must find the lock held, as its holder releases it
            self.quick.acquire()

    def _renew(self) -> None:
        self._turn = threading.Lock()
        if self.quick.acquire(blocking=False):  # free, or held by the thread that forked
            self.quick.release()
        else:
            self.quick, self.depth = threading.RLock(), 0


def _after_fork() -> None:
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    # A thread that held the lock is not in the child, and would hold it for ever.
    os.register_at_fork(after_in_child=_after_fork)
