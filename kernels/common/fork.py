"""What a fork leaves behind: one thread, and copies of locks that threads of the parent may have held.

A lock is either held over the fork, so that what it guards is whole in the child, or renewed in the child, where the
fork cannot wait for its holder (a net at work holds its lock for hours).
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol

_is_child = False


class Lock(Protocol):
    """What `hold` needs of a lock."""

    def acquire(self) -> Any: ...

    def release(self) -> Any: ...


_held: list[Lock] = []
_taken: list[Lock] = []  # by the fork that is under way
_owners: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def in_child() -> bool:
    """Whether this process was forked from one that had loaded fastdl."""
    return _is_child


def hold(lock: Lock) -> None:
    """Make every fork wait for a lock: what it guards is whole in the child.

    Parameters
    ----------
    lock : reentrant lock
        A signal handler may fork while its thread holds the lock. Locks are taken in the order of these calls, which is
        the order in which a thread that needs two of them must take them.
    """
    _held.append(lock)


def renew(owner: Any, name: str) -> None:
    """Set ``owner.name`` to a fresh reentrant lock, now and in every forked child.

    Parameters
    ----------
    owner : object
        An object or a module; it is not kept alive.
    """
    setattr(owner, name, threading.RLock())
    _owners.setdefault(owner, set()).add(name)


def _before() -> None:
    for lock in _held:
        lock.acquire()
        _taken.append(lock)


def _after() -> None:
    while _taken:
        _taken.pop().release()


def _in_child() -> None:
    global _is_child
    _is_child = True
    _after()
    for owner, names in list(_owners.items()):
        for name in names:
            setattr(owner, name, threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
