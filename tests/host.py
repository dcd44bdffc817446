"""What belongs to the process that fastdl is a guest in: the fixture of conftest.py compares it around every test."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import numpy as np

from fastdl.kernels.common import blas

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGPIPE", "SIGFPE", "SIGUSR1") if hasattr(signal, n)]
#: Set by scikit-learn and polars when they are imported.
NOT_OURS = (b"KMP_INIT_AT_FORK", b"_RJEM_MALLOC_CONF")
_C = ctypes.CDLL(None)
_TINY = 5e-324


def state() -> dict[str, Any]:
    """Thread counts, environment, signals, floating-point mode, NumPy's own state; 50 us."""
    numba = sys.modules.get("numba.np.ufunc.parallel")
    stream = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return {
        "BLAS threads": [library.get_num_threads() for library in blas._libraries()],
        "Numba threads": numba.get_num_threads() if numba is not None and numba._is_initialized else None,
        "environment": {k: v for k, v in os.environ._data.items() if b"PYTEST_" not in k and k not in NOT_OURS},
        "current folder": os.getcwd(),
        "signal mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()) if hasattr(signal, "pthread_sigmask") else None,
        "signal handlers": [signal.getsignal(one) for one in SIGNALS],
        "rounding": _C.fegetround() if hasattr(_C, "fegetround") else None,
        "traps": _C.fegetexcept() if hasattr(_C, "fegetexcept") else None,
        "denormals": _TINY * (_TINY + 1.0) != 0.0,
        "NumPy's error states": np.geterr(),
        "NumPy's error handler": np.geterrcall(),
        "NumPy's random numbers": (stream["pos"], int(stream["key"][0])),
    }
