"""What a fork leaves behind: one thread, and copies of locks that threads of the parent may have held."""

from __future__ import annotations

import os
from typing import Any, Protocol

#: Whether this process was forked from one that had loaded fastdl.
is_child = False


class Lock(Protocol):
    """What `hold` needs of a lock."""

    def acquire(self) -> Any: ...

    def release(self) -> Any: ...


_held: list[Lock] = []
_taken: list[Lock] = []  # by the fork that is under way


def hold(lock: Lock) -> None:
    """Make every fork wait for a lock: what it guards is whole in the child.

    Parameters
    ----------
    lock : reentrant lock
        A signal handler may fork while its thread holds the lock. Locks are taken in the order of these calls, which is
        the order in which a thread that needs two of them must take them.
    """
    _held.append(lock)


def _before() -> None:
    for lock in _held:
        lock.acquire()
        _taken.append(lock)


def _after() -> None:
    while _taken:
        _taken.pop().release()


def _in_child() -> None:
    global is_child
    is_child = True
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
