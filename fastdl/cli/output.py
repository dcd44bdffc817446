"""What the commands say beside their results; a stream that is closed or full is no error of theirs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator


def tell(message: str) -> None:
    """One line on stderr, if there is one."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        with contextlib.suppress(OSError):
            print("fastdl:", " ".join(message.split()), file=sys.stderr, flush=True)


def show(line: str) -> None:
    """One line on stdout for a reader; letters that its encoding lacks are escaped, as Python does it on stderr."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


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


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """An error of the system names this file: a full disk names none, and a file that is replaced has another name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from None


def keep_inputs(option: str, path: str, *inputs: str) -> None:
    """Refuse to write over a file that is read, by whatever name or link."""
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise ValueError(f"{option} {path} would replace {source}, which this command reads; name another file")
