"""The SIMD level that the compiled kernels run at: chosen once from the CPU, forced by ``FASTDL_SIMD`` or `select`."""

from __future__ import annotations

import os
from typing import Any

NAMES = ("portable", "avx2", "avx512")  # the numbers of common/level.h
_modules: list[Any] = []
_level: int | None = None


def levels() -> tuple[str, ...]:
    """Levels that this CPU can run, lowest first."""
    from fastdl.kernels.common import _cython

    return NAMES[: _cython.best_level() + 1]


def level() -> str:
    """The level in use."""
    global _level
    if _level is None:
        _level = _chosen()
    return NAMES[_level]


def _chosen() -> int:
    available = levels()
    name = os.environ.get("FASTDL_SIMD", "") or available[-1]
    if name not in available:
        raise ValueError(f"FASTDL_SIMD={name!r}: this CPU runs {', '.join(available)}; set one of them or unset it")
    return NAMES.index(name)


def select(name: str) -> None:
    """Run every compiled kernel at a level from now on (tests and measurements)."""
    global _level
    if name not in levels():
        raise ValueError(f"SIMD level {name!r} is not available, expected one of {', '.join(levels())}")
    _level = NAMES.index(name)
    for module in _modules:
        module.select(_level)


def attach(module: Any) -> None:
    """Tell a newly imported family which level to use, now and after every `select`.

    Raises
    ------
    ImportError
        The family was built against another ABI than the engine: its calls would be read at other places.
    """
    from fastdl.kernels.engine import _cython as engine

    if not all(engine.fits(capsule) for native in module.kernels().values() for capsule in native.values()):
        raise ImportError(
            f"{module.__name__} was built against another abi.h than {engine.__name__}; rebuild everything: "
            "pip install -e ."
        )
    level()
    module.select(_level)
    if module not in _modules:
        _modules.append(module)
