"""``python -m fastdl``."""

from fastdl.cli import main

raise SystemExit(main())
