"""``python -m fastdl``."""

import sys

try:
    from fastdl.cli import main

    status = main()
except KeyboardInterrupt:  # between the interpreter's start and that of a command
    if sys.stderr is not None:
        sys.stderr.write("fastdl: interrupted\n")
    status = 130
raise SystemExit(status)
