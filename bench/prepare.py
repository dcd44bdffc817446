"""From a case to two functions, ours and NumPy's, on preallocated arrays, after the case has passed its check."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastdl as fd
from bench.cases import NETS, RUNTIME, SHAPES, Case, ChainCase, NetCase, OpCase, sizes, without
from fastdl.kernels import dispatch
from fastdl.kernels.registry import Impl, OpSpec, Tolerance
from fastdl.run.executor import Run

DTYPE = np.dtype(np.float32)  # speed is promised for float32
#: Share of elements that may miss the tolerance behind a fused activation: at a kink, the last bit of the batch
#: statistics decides the side, and one element on the other side moves its column's sums.
AT_KINKS = 0.01


@dataclass(frozen=True)
class Prepared:
    """What is timed. One call of either function does ``steps`` steps of the given cost each."""

    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    shape: str
    bytes: float
    flops: float
    footprint: int  # bytes of the arrays
    steps: int = 1


def prepare(case: Case, threads: int = 1) -> Prepared:
    """Check a case against the reference and make it ready.

    Raises
    ------
    fastdl.errors.BackendUnavailable
        The back end cannot run here.
    AssertionError
        The result is wrong: then there is no number.
    """
    maker = {OpCase: _op, ChainCase: _chain, NetCase: _net}[type(case)]
    return maker(case, threads)


# ---------------------------------------------------------------------------------------------- ops
def _arrays(case: OpCase) -> list[np.ndarray | None]:
    rng = np.random.default_rng(1)
    return case.spec.make(rng, sizes(case.spec, SHAPES[case.shape]), DTYPE, without(case.spec, case.params))


def _with_outputs(spec: OpSpec, arrays: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """The same inputs, copies of everything that is written."""
    pairs = zip(spec.arrays, arrays, strict=True)
    return [a if a is None or array.role == "in" else a.copy() for array, a in pairs]


@functools.lru_cache(maxsize=1)  # the back ends of a case stand together
def _wanted(op: str, variant: int, shape: str) -> list[np.ndarray | None]:
    """The reference's outputs in float64."""
    case = OpCase(op, variant, shape, "numpy")
    arrays = _arrays(case)
    wide = [a.astype(np.float64) if a is not None and a.dtype == DTYPE else a for a in arrays]
    case.spec.reference(*wide, **case.params, **{name: RUNTIME[name] for name in case.spec.runtime})
    return wide


def close(got: np.ndarray, want: np.ndarray, tolerance: Tolerance, eps: float, misses: float = 0.0) -> bool:
    """Whether all elements, or all but a share of ``misses``, are within an op's tolerance."""
    if want.dtype.kind != "f":
        return bool(np.array_equal(got, want))
    finite = np.isfinite(want)
    size = np.where(finite, np.abs(want), 0.0)
    allowed = eps * (tolerance.ulp * size + tolerance.norm * np.max(size, initial=0.0))
    with np.errstate(invalid="ignore"):
        near = np.abs(got - want) <= allowed
    right = np.where(finite, near, (got == want) | (np.isnan(got) & np.isnan(want)))
    return bool(np.count_nonzero(~right) <= misses * want.size)


def _op(case: OpCase, threads: int) -> Prepared:
    spec, params = case.spec, case.params
    arrays = _arrays(case)
    arguments = params | {name: RUNTIME[name] for name in spec.runtime}
    impl = dispatch.choose(case.op, case.backend, arrays, params)
    values = sizes(spec, SHAPES[case.shape])

    mine = _with_outputs(spec, arrays)
    dispatch.call(impl, mine, arguments, threads)
    tolerances = spec.tolerances(values)
    misses = AT_KINKS if params.get("activation", "identity") != "identity" else 0.0
    eps = float(np.finfo(DTYPE).eps)
    for array, got, want in zip(spec.arrays, mine, _wanted(case.op, case.variant, case.shape), strict=True):
        if got is not None and array.role != "in":
            assert close(got, want, tolerances[array.name], eps, misses), (
                f"{case}: {array.name} differs from the reference"
            )

    theirs = _with_outputs(spec, arrays)
    numpy = dispatch.choose(case.op, "numpy")
    return Prepared(
        _caller(impl, mine, arguments, threads),
        _caller(numpy, theirs, arguments, threads),
        ", ".join(f"{k}={v}" for k, v in values.items()),
        _moved(spec, arrays, values),
        spec.flops(values),
        sum(a.nbytes for a in arrays if a is not None),
    )


def _caller(
    impl: Impl, arrays: Sequence[np.ndarray | None], arguments: Mapping[str, Any], threads: int
) -> Callable[[], None]:
    call = dispatch.caller(impl)  # what `fd.ops` keeps, too
    if "epoch" not in arguments:
        return lambda: call(arrays, arguments, threads)
    epochs = itertools.count()  # a new one each time: an implementation may keep what it drew for the last
    return lambda: call(arrays, {**arguments, "epoch": next(epochs)}, threads)


def _moved(spec: OpSpec, arrays: Sequence[np.ndarray | None], values: Mapping[str, int]) -> float:
    absent = [array.name for array, a in zip(spec.arrays, arrays, strict=True) if a is None]
    return spec.moved(values, DTYPE.itemsize, absent)


# ---------------------------------------------------------------------------------------------- layers and nets
def _loop(case: ChainCase, backend: str, fuse: bool, threads: int) -> tuple[fd.Sequential, list[np.ndarray]]:
    """A net after one forward and backward pass, and what came out."""
    shape, rng = SHAPES[case.shape], np.random.default_rng(1)
    x, dy = (rng.standard_normal((shape.rows, shape.cols), np.float32) for _ in range(2))
    net = fd.Sequential(case.layers(), seed=1)
    net.compile(optimizer="adam", backend=backend, threads=threads, fuse=fuse)
    return net, [net.forward(x, training=True), net.backward(dy)]


def _chain(case: ChainCase, threads: int) -> Prepared:
    """The Program's forward and backward calls; the batch already lies where the layer before has written it."""
    net, got = _loop(case, case.backend, True, threads)
    numpy, want = _loop(case, "numpy", False, threads)
    for name, a, b in zip(("y", "dx"), got, want, strict=True):
        tolerance = Tolerance(ulp=16.0, norm=64.0 + 2.0 * np.sqrt(SHAPES[case.shape].rows))
        assert close(a, b, tolerance, float(np.finfo(DTYPE).eps), AT_KINKS), f"{case}: {name} differs from NumPy"
    run = Run(rows=SHAPES[case.shape].rows, total_rows=SHAPES[case.shape].rows)

    dy = np.random.default_rng(1).standard_normal((run.rows, SHAPES[case.shape].cols), np.float32)

    def timed(model: fd.Sequential) -> Callable[[], None]:
        bound = model._last[0]
        bound.executor.slot(bound.dy, dy)

        def both() -> None:
            bound.executor.run(run, "forward")
            bound.executor.run(run, "backward")

        return both

    program = net._last[0].executor.program
    calls = [c for c in program.calls if c.phase in ("forward", "backward")]
    buffers = {b for c in calls for b in c.arrays() if b is not None}
    return Prepared(
        timed(net),
        timed(numpy),
        f"N={run.rows}, C={SHAPES[case.shape].cols}",
        sum(c.moved(run.rows, DTYPE.itemsize) for c in calls),
        sum(c.spec.flops(c.sizes(run.rows)) for c in calls),
        sum(b.size(run.rows) * DTYPE.itemsize for b in buffers),
    )


def _net(case: NetCase, threads: int) -> Prepared:
    net, rng = NETS[case.net], np.random.default_rng(1)
    steps = net.fit_steps if case.entry == "fit" else 1
    X = rng.standard_normal((net.batch * steps, net.widths[0]), np.float32)
    y = rng.integers(0, net.widths[-1], len(X))
    made, losses = [], []
    for backend in (case.backend, "numpy"):
        model = fd.Sequential(net.layers(), seed=1)
        model.compile(
            loss="softmax_cross_entropy", optimizer="adam", backend=backend, threads=threads, fuse=backend != "numpy"
        )
        losses.append([model.train_on_batch(X[: net.batch], y[: net.batch]) for _ in range(2)])
        made.append(model)
    # The first loss is that of one pass; the second has been through backward and Adam, whose first step is
    # lr * sign(g) and turns the sign of a rounding error into a whole step.
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-4, err_msg=f"{case}: first loss")
    np.testing.assert_allclose(losses[0][1], losses[1][1], rtol=1e-2, err_msg=f"{case}: second loss")

    def timed(model: fd.Sequential) -> Callable[[], Any]:
        if case.entry == "fit":
            return lambda: model.fit(X, y, batch_size=net.batch, epochs=1, verbose=0)
        return lambda: model.train_on_batch(X, y)

    program = made[0].program
    state = 4 * sum(value.nbytes for value in made[0].weights.values())  # weights, gradients, two moments
    shape = f"{net.batch}; {'-'.join(map(str, net.widths))}; {net.rate}"
    return Prepared(timed(made[0]), timed(made[1]), shape, program.bytes(), program.flops(), state + X.nbytes, steps)
