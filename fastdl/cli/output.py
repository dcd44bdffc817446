"""What the commands say beside their results; a stream that is closed or full is no error of theirs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable


def tell(message: str) -> None:
    """One line on stderr, if there is one."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        with contextlib.suppress(OSError):
            print("fastdl:", " ".join(message.split()), file=sys.stderr, flush=True)


def tell_notices(source: str, notices: Iterable[str]) -> None:
    for notice in notices:
        tell(f"note: {source}: {notice}")


def close_outputs() -> None:
    """Flush what was said; a stream that takes no more must not meet the interpreter's own last flush."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
