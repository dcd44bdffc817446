"""What `Sequential.compile` decides, checked."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np

from fastdl import checks, config, losses, optimizers
from fastdl.errors import BackendUnavailable
from fastdl.kernels import dispatch
from fastdl.losses import Loss
from fastdl.optimizers import Optimizer

DTYPES = ("float32", "float64", dispatch.MIXED)


@dataclass(frozen=True)
class Settings:
    """What `Sequential.compile` decides."""

    backend: str = "auto"
    threads: int | str = "auto"
    dtype: str = "float32"
    fuse: bool = True
    loss: Loss | None = None
    optimizer: Optimizer | None = None
    note: str = ""  #: why a setting is not the one that a file asks for

    @property
    def float(self) -> str:
        """Type of the arrays outside and of parameters: mixed Programs keep float32."""
        return "float32" if self.dtype == dispatch.MIXED else self.dtype

    @classmethod
    def checked(
        cls,
        loss: str | Loss | None,
        optimizer: str | Optimizer,
        backend: str,
        threads: int | str,
        dtype: str,
        fuse: bool,
        note: str = "",
    ) -> Settings:
        """The arguments of `Sequential.compile` as settings.

        Raises
        ------
        ValueError
            For an unknown name; the known ones are listed.
        BackendUnavailable
            When the back end cannot run here; the message says why.
        """
        dtype = _dtype(dtype)
        fuse = checks.flag(fuse, "fuse")
        if not config.is_auto(threads):
            threads = config.check_threads(threads)
        config.check_backend(backend)
        if backend != "auto" and (state := dispatch.load(backend)) != "available":
            raise BackendUnavailable(f"back end {backend!r} is not available: {state}")
        if why := cannot_run(dtype, backend):
            raise BackendUnavailable(f"dtype {dtype!r} cannot run here: {why}; use 'float32'")
        chosen, rule = None if loss is None else losses.get(loss), optimizers.get(optimizer)
        settings = cls(backend, threads, dtype, fuse, chosen, rule, note)
        checks.settings_fit(rule, np.dtype(settings.float))
        return settings


def _dtype(value: object) -> str:
    """The name of a float type, in whatever way NumPy has it."""
    name = value
    if isinstance(value, type | np.dtype):
        with contextlib.suppress(TypeError):
            name = np.dtype(value).name
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype: unknown {name!r}, known: {', '.join(DTYPES)}")
    return name


def cannot_run(dtype: str, backend: str) -> str | None:
    """Why no back end that ``backend`` stands for can compute in a dtype, or None."""
    asked = "cython" if backend == "auto" and dtype == dispatch.MIXED else backend
    return None if asked == "auto" else dispatch.refuses(asked, dtype)
