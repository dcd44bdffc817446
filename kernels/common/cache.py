"""The folder for compiled kernels: Numba unpickles what lies there, so nobody else may be able to write to it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator


def folder(key: str) -> tuple[str | None, list[str]]:
    """A private folder for files of a key, made if need be; and why folders were passed over.

    ``NUMBA_CACHE_DIR`` or the user's cache folder comes first, then a folder of the user's own among the temporary
    files. None if nothing can be written: kernels are then compiled anew in every process.
    """
    refusals = []
    for base, name in _candidates(key):
        path = os.path.join(base, name)
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            why = _objection(path)
            if why is None:
                with tempfile.TemporaryFile(dir=path):
                    return path, refusals
        except OSError as error:
            why = f"{path} cannot be written ({error.strerror or error})"
        refusals.append(why)
    return None, refusals


def _candidates(key: str) -> Iterator[tuple[str, str]]:
    """Folders to try: the part that may be shared with others, and what stands in it."""
    chosen = os.path.expanduser(os.environ.get("NUMBA_CACHE_DIR") or "")
    if chosen and not chosen.startswith("~"):  # it stays where there is no such home
        yield os.path.abspath(chosen), f"kernels-{key}"
    else:
        # A relative folder would be made wherever the process happens to stand.
        homes = os.environ.get("XDG_CACHE_HOME") or "", os.path.expanduser("~/.cache")
        home = next(filter(os.path.isabs, homes), None)
        if home is not None:
            yield home, os.path.join("fastdl", f"kernels-{key}")
    with contextlib.suppress(OSError):  # no temporary folder can be written either
        user = os.getuid() if hasattr(os, "getuid") else 0
        yield tempfile.gettempdir(), os.path.join(f"fastdl-{user}", key)


def _objection(path: str) -> str | None:
    """How others could put files into a folder, or None.

    The folder itself must be the user's and closed to others. Above it, a folder that others may write to must be
    sticky, as /tmp is: its other entries cannot be exchanged then.
    """
    if not hasattr(os, "getuid"):
        return None
    user = os.geteuid()
    about = os.lstat(path)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != user:
        return f"{path} is not a folder of this user (uid {user})"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(about.st_mode):o}); remove it"
    above = os.path.realpath(path)
    while above != os.path.dirname(above):
        above = os.path.dirname(above)
        about = os.stat(above)
        if about.st_uid not in (0, user):
            return f"{above} belongs to another user (uid {about.st_uid})"
        if about.st_mode & stat.S_IWOTH and not about.st_mode & stat.S_ISVTX:
            return f"{above} can be written by others (mode {stat.S_IMODE(about.st_mode):o})"
    return None
