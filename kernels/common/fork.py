"""What a fork leaves behind: one thread, and copies of locks that threads of the parent may have held."""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol

#: Whether this process was forked from one that had loaded fastdl.
is_child = False


class Lock(Protocol):
    """What `hold` needs of a lock."""

    def acquire(self) -> Any: ...

    def release(self) -> Any: ...


_held: list[Lock] = []
_forker: int | None = None  # the thread that has taken them


def hold(lock: Lock) -> None:
    """Make every fork wait for a lock: what it guards is whole in the child.

    Parameters
    ----------
    lock : Lock
        Reentrant: a signal handler may fork while its thread holds the lock. Locks are taken in the order of these
        calls, which is the order in which a thread that needs two of them must take them.
    """
    _held.append(lock)
    if hasattr(os, "register_at_fork"):
        # The hook that was registered last comes first. It must come before those of the modules that a holder of the
        # lock may need: `logging` holds its own lock over a fork, and Numba logs while it compiles.
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)


def _before() -> None:
    global _forker
    if _forker == threading.get_ident():
        return
    taken: list[Lock] = []
    try:
        for lock in _held:
            lock.acquire()
            taken.append(lock)
    except BaseException:  # an interrupt; the fork goes on all the same
        for lock in reversed(taken):
            lock.release()
        raise
    _forker = threading.get_ident()


def _after() -> None:
    global _forker
    if _forker != threading.get_ident():
        return
    _forker = None
    for lock in reversed(_held):
        lock.release()


def _in_child() -> None:
    global is_child
    is_child = True
    _after()
