"""``python -m fastdl``."""

import sys

try:
    from fastdl.cli import main

    status = main()
except KeyboardInterrupt:  # between the interpreter's start and that of a command
    print("fastdl: interrupted", file=sys.stderr)
    status = 130
raise SystemExit(status)
