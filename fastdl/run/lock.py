"""The locks of a net: trainings in turn, one caller at its memory, and fresh ones in a forked child."""

from __future__ import annotations

import os
import threading
import weakref

from fastdl.errors import NetAtWork

_all: weakref.WeakSet[NetLocks] = weakref.WeakSet()


class NetLocks:
    """Python's own re-entrant locks, taken by ``with`` alone.

    An interrupt is raised between two steps of Python, never inside of such a ``with``. A lock written in Python would
    stay held for ever where one arrives behind its ``acquire``.

    Attributes
    ----------
    training : RLock
        Held by a training from its first step to its last; taken before ``memory``.
    memory : RLock
        Held by whoever is at the tensors. A training lets go of it between slices and while callbacks run.
    depth : int
        Calls of `fit` under way, one inside a callback of the other.
    at_work : bool
        The holder of ``memory`` has arrays bound to a Program. A signal handler or a finalizer runs in the thread that
        holds the lock, in the middle of it: it must not bind others.
    """

    def __init__(self) -> None:
        self.training, self.memory = threading.RLock(), threading.RLock()
        self.depth, self.at_work = 0, False
        _all.add(self)

    def refuse(self) -> None:
        """Raise where ``at_work`` was found set by who holds the lock."""
        raise NetAtWork(
            "this net is at work in this thread: expected a call between two of its own, found one from a signal "
            "handler or a finalizer; set a flag there (net.stop_training = True, say) and call the net when it is done"
        )

    def _renew(self) -> None:
        for name in ("training", "memory"):
            lock = getattr(self, name)
            if lock.acquire(blocking=False):  # free, or held by the thread that forked
                lock.release()
                continue
            setattr(self, name, threading.RLock())
            if name == "training":
                self.depth = 0
            else:
                self.at_work = False


def _after_fork() -> None:
    for locks in list(_all):
        locks._renew()


if hasattr(os, "register_at_fork"):
    # A thread that held a lock is not in the child, and would hold it for ever.
    os.register_at_fork(after_in_child=_after_fork)
