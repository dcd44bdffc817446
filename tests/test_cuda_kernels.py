"""The CUDA kernels without a GPU: their PTX, run by the interpreter, against the float64 references."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fastdl.kernels import dispatch, registry
from fastdl.kernels.common import numba_cuda

if numba_cuda.MISSING:
    pytest.skip(numba_cuda.MISSING, allow_module_level=True)

from gpu.device import Interpreted

dispatch.load("numpy")
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}


def ops() -> Iterator[str]:
    dispatch.load_cuda()
    return (spec.name for spec in registry.specs() if registry.find(spec.name, "cuda"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ops())
def test_matches_the_reference(op: str, dtype: str) -> None:
    spec, impl = registry.spec(op), registry.find(op, "cuda")
    for rows, cols, gap, offset in [(1, 1, 0, 0), (5, 24, 0, 0), (33, 40, 8, 0), (7, 19, 3, 0), (16, 32, 0, 4)]:
        device = Interpreted()
        rng = np.random.default_rng(rows)
        sizes = dict.fromkeys(spec.letters, cols) | {"N": rows}
        arrays = spec.make(rng, sizes, np.float32)
        views = [device.put(a, dtype, gap, offset) for a in arrays]
        exact = [None if v is None else device.get(v) for v in views]
        wanted = [None if a is None else a.astype(np.float64) if a.dtype == np.float32 else a.copy() for a in exact]
        params = spec.defaults()
        drawn = {"step": 3, "epoch": 2, "first_row": 5, "total_rows": rows + 2, "offset": 0, "lr": 0.01}
        runtime = {name: drawn[name] for name in spec.runtime}
        spec.reference(*wanted, **params, **runtime)
        for launch in impl.launches(views, params, device.planner(**{"rows": rows, **runtime})):
            device.launch(launch)
        tolerance = spec.tolerance(sizes)
        for array, view, want in zip(spec.arrays, views, wanted, strict=True):
            if array.role == "in":
                continue
            got = device.get(view)
            bound = (EPS[dtype] * np.abs(want) / 2 if dtype == "bfloat16" else 0) + EPS["float32"] * (
                (tolerance.ulp + 2) * np.abs(want) + tolerance.norm * np.abs(want).max(initial=0)
            )
            assert (np.abs(got - want) <= bound).all(), (op, array.name, rows, cols, np.abs(got - want).max())
