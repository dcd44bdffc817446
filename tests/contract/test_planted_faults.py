"""Every check of the contract turns red on a fault planted for it.

A faulty implementation takes the place of a registered one: it runs the right one and then spoils something. One op per
fault stands for all, for the checks know no op by name.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from contract import cases, checks
from fastdl.kernels import dispatch, registry
from fastdl.kernels.registry import Impl, Tolerance

FLOAT32, FLOAT64 = cases.DTYPES


@pytest.fixture
def plant(monkeypatch, backend):
    """plant(op, fault): replace an implementation; ``fault(right, arrays, arguments)`` gets the right one to call."""

    def put(op, fault):
        right = dispatch.candidate(op, backend)
        assert not isinstance(right, str), right

        def faulty(*arrays, threads=1, **arguments):
            named = dict(zip((a.name for a in registry.spec(op).arrays), arrays, strict=True))

            def go(**changed):
                given = {**named, **{k: v for k, v in changed.items() if k in named}}
                scalars = {**arguments, **{k: v for k, v in changed.items() if k in arguments}}
                dispatch.caller(right)(tuple(given.values()), scalars, changed.get("threads", threads))

            fault(go, named, {**arguments, "threads": threads})

        register(monkeypatch, Impl(op, backend, faulty))

    return put


def register(monkeypatch, impl):
    """Put an implementation in the place of the registered one, for one test."""
    monkeypatch.setitem(registry._impls, (impl.op, impl.backend), impl)
    monkeypatch.setattr(dispatch, "_callers", {})  # what was bound before


def some_call(op, dtype=FLOAT32, **variant):
    """The first call of the slice with a full tile and a tail, of a variant."""
    for call in cases.calls(registry.spec(op), dtype):
        if (
            min(call.sizes.values()) > 6
            and variant.items() <= call.arguments.items()
            and all(x is not None for x in call.arrays)
        ):
            return call
    raise AssertionError(f"{op}: no call of variant {variant}")


def red(check, *arguments, says=""):
    """The check fails."""
    with pytest.raises(AssertionError, match=says):
        check(*arguments)


def planted(plant, op, fault, check, *arguments, says=""):
    """The check passes, and fails once the fault is planted."""
    check(*arguments)
    plant(op, fault)
    red(check, *arguments, says=says)


# ---------------------------------------------------------------------------------------------- against the reference
def wrong_sign(go, arrays, arguments):
    go()
    arrays["dx"] *= -1


def skipped_column(go, arrays, arguments):
    before = arrays["y"][:, -1].copy()
    go()
    arrays["y"][:, -1] = before


def skipped_row(go, arrays, arguments):
    before = arrays["y"][-1].copy()
    go()
    arrays["y"][-1] = before


def dropped_gamma(go, arrays, arguments):
    go(gamma=np.ones_like(arrays["gamma"]))


def stale_mask(go, arrays, arguments):
    go(step=arguments["step"] - 1)


def modified_input(go, arrays, arguments):
    go()
    arrays["x"][0, 0] += 1


def lost_bias(go, arrays, arguments):
    go(b=np.zeros_like(arrays["b"]))


def wrong_last_place(go, arrays, arguments):
    """An error of a hundred ulp in one element."""
    go()
    arrays["y"][-1, -1] *= 1 + 100 * np.finfo(arrays["y"].dtype).eps


@pytest.mark.parametrize(
    ("op", "variant", "fault", "says"),
    [
        ("relu_backward", {}, wrong_sign, "dx: "),
        ("relu_forward", {}, skipped_column, "y: .*nan"),
        ("dropout_forward", {}, skipped_column, "y: .*nan"),
        ("dense_forward", {}, skipped_row, "y: .*nan"),
        ("batchnorm_backward", {}, dropped_gamma, "dx: "),
        ("dropout_backward", {}, stale_mask, "dx: "),
        ("batchnorm_forward", {"rate": 0.3}, stale_mask, "y: "),
        ("sigmoid_forward", {}, modified_input, "input x was modified"),
        ("dense_forward", {"activation": "relu"}, lost_bias, "y: "),
        ("tanh_forward", {}, wrong_last_place, "1 of .* elements differ"),
    ],
)
def test_reference(op, variant, fault, says, plant, backend):
    planted(plant, op, fault, checks.matches_reference, some_call(op, **variant), backend, says=says)


@pytest.mark.parametrize("output", ["dx", "dgamma", "dbeta"])
@pytest.mark.parametrize("rows", [2, 3, 65])
def test_gradients_of_few_rows(rows, output, plant, backend):
    """With two rows little of dx is left but rounding: what is allowed for dx must not be allowed for the sums."""

    def turned(go, arrays, arguments):
        go()
        arrays[output] *= -1

    size, fused = {"N": rows, "C": 33}, {"activation": "relu"}
    spec = registry.spec("batchnorm_backward")
    call = cases.draw(spec, cases.rng(rows), size, FLOAT32, fused, ("slope", "dslope"))
    planted(plant, spec.name, turned, checks.matches_reference, call, backend, says=f"{output}: ")


@pytest.mark.parametrize("spec", registry.specs(), ids=lambda spec: spec.name)
def test_turned_signs(spec):
    """No array of any call has a tolerance that it meets with its signs turned."""
    for dtype in cases.DTYPES if any(a.dtype == "T" for a in spec.arrays) else (FLOAT32,):
        for call in cases.calls(spec, dtype):
            right = {
                a.name: want if x is None else want.astype(x.dtype)
                for a, x, want in zip(spec.arrays, call.arrays, call.want, strict=True)
            }
            assert checks.compare(call, right) is None
            for array in spec.outputs:
                x = right[array.name]
                if x is not None and x.dtype.kind == "f" and np.any(x):
                    wrong = checks.compare(call, {**right, array.name: -x})
                    assert wrong, f"{call}: {array.name}"
                    assert wrong.startswith(f"{array.name}: ")


@pytest.mark.parametrize("tolerance", [Tolerance(ulp=1e6), Tolerance(norm=1e6)], ids=["ulp", "norm"])
def test_a_tolerance_that_checks_nothing(tolerance):
    call = some_call("tanh_forward")
    right = {"y": call.want[1].astype(np.float32)}
    assert checks.compare(call, right) is None
    loose = replace(call, spec=replace(call.spec, tolerance=lambda sizes: {"y": tolerance}))
    assert "the tolerance allows" in checks.compare(loose, right)


def test_tolerances_are_those_of_the_outputs():
    spec = replace(registry.spec("tanh_forward"), tolerance=lambda sizes: {"x": Tolerance()})
    with pytest.raises(ValueError, match=r"tanh_forward.*expected a tolerance for each of \['y'\], found \['x'\]"):
        spec.tolerances({"N": 1, "C": 1})


@pytest.mark.parametrize("output", ["stats", "dz"])
def test_loss(output, plant, backend):
    def unscaled(go, arrays, arguments):
        go()
        arrays[output] *= 1.01

    call = some_call("softmax_cross_entropy", total_rows=0)
    planted(plant, "softmax_cross_entropy", unscaled, checks.matches_reference, call, backend, says=f"{output}: ")


def test_forgotten_correction_of_a_moment(plant, backend):
    def off_by_one(go, arrays, arguments):
        go(update=arguments["update"] + 1)

    call = some_call("adam_step", update=2)
    planted(plant, "adam_step", off_by_one, checks.matches_reference, call, backend, says="w: ")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda y: y.data[0, y.rows].fill(0), "outside the rows in use"),
        (lambda y: y.data[-1, 0, -1:].fill(np.nan), "padding"),
        (lambda y: y.data[-1, 0, :1].fill(7), "1 of .* elements differ"),
    ],
    ids=["beyond-the-rows", "padding", "value"],
)
def test_panels(spoil, says, monkeypatch, level):
    call, right = some_call("leaky_relu_forward"), dispatch.run
    checks.matches_reference(call, "cython", 1, "panels")

    def faulty(op, x, y, **arguments):
        right(op, x, y, **arguments)
        spoil(y)

    monkeypatch.setattr(dispatch, "run", faulty)
    red(checks.matches_reference, call, "cython", 1, "panels", says=says)


def test_padding_of_weights(monkeypatch, level):
    """The optimiser sweeps over the padding of a weight's gradient: it must be 0, not only finite."""
    call, right = some_call("dense_backward_weights"), dispatch.run

    def faulty(op, x, dy, dw, db, **arguments):
        right(op, x, dy, dw, db, **arguments)
        dw.data[-1, 0, -1] = 1

    checks.matches_reference(call, "cython", 1, "panels")
    monkeypatch.setattr(dispatch, "run", faulty)
    red(checks.matches_reference, call, "cython", 1, "panels", says="padding of its panels is not 0")


# ---------------------------------------------------------------------------------------------- arrays
@pytest.mark.parametrize("layout", ["plain", "strided", "reversed", "shifted", "fence-end-gap"])
def test_memory_around_an_array(layout, plant, backend):
    """One element is written behind the last row (in front of it, if rows go backwards)."""
    if layout.startswith("fence") and sys.platform == "win32":
        pytest.skip("mprotect is POSIX")

    def one_too_many(go, arrays, arguments):
        go()
        y = arrays["y"]
        row = y[-1] if layout == "reversed" else y[0]
        np.lib.stride_tricks.as_strided(row, (y.shape[1] + 1,))[-1] = 0

    def behind_the_array(go, arrays, arguments):
        go()
        y = arrays["y"]
        np.lib.stride_tricks.as_strided(y, (y.size + 1,), (y.itemsize,))[-1] = 0

    fault = one_too_many if layout in ("strided", "reversed", "fence-end-gap") else behind_the_array
    call = some_call("relu_forward")
    planted(plant, "relu_forward", fault, checks.matches_reference, call, backend, 1, layout, says="wrote outside")


def test_ignored_strides(plant, backend):
    def as_if_contiguous(go, arrays, arguments):
        x = arrays["x"]
        go(x=np.lib.stride_tricks.as_strided(x, x.shape, (x.shape[1] * x.itemsize, x.itemsize)))

    call = some_call("relu_forward")
    planted(plant, "relu_forward", as_if_contiguous, checks.matches_reference, call, backend, 1, "strided", says="y: ")


def test_repeated_rows(plant, backend):
    def other_rows(go, arrays, arguments):
        go()
        if arrays["x"].strides[0] == 0:
            arrays["y"][1:] = 0

    call = some_call("relu_forward")
    call = call.having(x=np.repeat(call.arrays[0][:1], len(call.arrays[0]), axis=0))
    planted(plant, "relu_forward", other_rows, checks.is_as_plain, call, backend, "repeated", says="y: ")


def test_alias(plant, backend):
    def output_first(go, arrays, arguments):
        arrays["y"][0] = 0
        go()

    call = some_call("relu_forward")
    planted(
        plant,
        "relu_forward",
        output_first,
        checks.takes_alias,
        call,
        backend,
        ("x", "y"),
        says="y differs where y is x",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("layout", ["fence-end", "fence-start"])
def test_fence(layout):
    """A read past the end (before the start) kills the process, in a process of its own."""
    program = f"""
import sys
import numpy as np
import fastdl
from contract import cases, layouts
from fastdl.kernels import registry
spec = registry.spec("relu_forward")
x = layouts.place(spec, [np.ones((3, 5), np.float32), None], {layout!r}, False)[0].argument()
print(x.sum(), flush=True)
by = 1 if {layout!r} == "fence-end" else -1
print(np.lib.stride_tricks.as_strided(x, (2,), (by * 4 * (x.size if by > 0 else 1),))[1])
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=_environment(), check=False
    )
    assert ran.stdout == "15.0\n", ran.stderr
    assert ran.returncode < 0, "the process survived a read across the fence"


def _environment():
    """What a process of its own needs to import `contract`, and fastdl from a tree that is not installed."""
    tests = pathlib.Path(__file__).resolve().parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


# ---------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize(
    ("op", "back", "fault", "says"),
    [
        ("tanh_forward", "tanh_backward", wrong_sign, "dx is off"),
        ("batchnorm_forward", "batchnorm_backward", dropped_gamma, "dx is off"),
        ("dropout_forward", "dropout_backward", stale_mask, "dx is off"),
    ],
)
def test_gradient(op, back, fault, says, plant, backend):
    call = next(iter(checks.gradient_calls(registry.spec(op))))
    planted(plant, back, fault, checks.gradients, call, backend, says=says)


def test_gradient_that_is_slightly_off(plant, backend):
    def by_a_millionth(go, arrays, arguments):
        go()
        arrays["dw"][0, 0] += 1e-6

    call = next(iter(checks.gradient_calls(registry.spec("dense_forward"))))
    fault = by_a_millionth
    planted(plant, "dense_backward_weights", fault, checks.gradients, call, backend, says="dw is off")


def test_loss_gradient(plant, backend):
    def unscaled(go, arrays, arguments):
        go()
        arrays["dz"] *= 1 + 1e-6

    call = next(iter(checks.gradient_calls(registry.spec("mse"))))
    planted(plant, "mse", unscaled, checks.gradients, call, backend, says="dz is off")


# ---------------------------------------------------------------------------------------------- special values
@pytest.mark.parametrize(
    ("op", "value"), [("relu_forward", np.nan), ("tanh_forward", np.inf), ("sigmoid_forward", -np.inf)]
)
def test_special_value(op, value, plant, backend):
    def swallowed(go, arrays, arguments):
        x = arrays["x"]
        here = np.isnan(x) if np.isnan(value) else x == value
        go(x=np.where(here, x.dtype.type(0.25), x))

    planted(plant, op, swallowed, checks.special_values, registry.spec(op), backend, FLOAT32, says="expected")


# ---------------------------------------------------------------------------------------------- bits
def test_thread_count_that_shows(plant, backend):
    def by_threads(go, arrays, arguments):
        go()
        if arguments["threads"] == 3:
            arrays["y"][-1, -1] = np.nextafter(arrays["y"][-1, -1], np.float32(np.inf))

    call = some_call("softplus_forward")
    planted(plant, "softplus_forward", by_threads, checks.same_bits, call, backend, (1, 2, 3), says="y differs")


def test_run_that_differs(plant, backend):
    runs = itertools.count()

    def now_and_then(go, arrays, arguments):
        go()
        if next(runs) == 2:
            arrays["y"][0, 0] = -arrays["y"][0, 0]

    call = some_call("softplus_forward")
    planted(plant, "softplus_forward", now_and_then, checks.same_bits, call, backend, (1, 1, 1), says="y differs")


# ---------------------------------------------------------------------------------------------- refusals, poison, kinks
def test_refusal():
    x = np.ones(3)

    def right():
        raise ValueError("x: expected shape (2,), found (3,)")

    def late():
        x[0] += 1
        right()

    checks.refuses(right, ValueError, ["expected", "found"], [x])
    red(checks.refuses, right, ValueError, ["expected", "np.ascontiguousarray"], says="lacks")
    red(checks.refuses, lambda: None, ValueError, [], says="went through")
    red(checks.refuses, late, ValueError, ["expected"], [x], says="written before the error")
    with pytest.raises(ValueError, match="found"):
        checks.refuses(right, TypeError, [])


def test_fresh_arrays_of_fastdl_hold_nan(monkeypatch):
    """A kernel that writes nothing leaves NaN in what a public function allocates."""
    from fastdl import ops

    register(monkeypatch, Impl("relu_forward", "numpy", lambda x, y, threads=1: None))
    assert np.isnan(ops.relu_forward(np.ones((3, 4)), backend="numpy")[0]).all()


def test_draws_near_a_kink_are_told_from_faults():
    """|x| at 1e-9: the derivative's sign hangs on a rounding error, so the draw is thrown away; elsewhere it is not."""
    call = some_call("abs_backward")
    assert not checks.is_ill_conditioned(call)
    forward = cases.draw(
        registry.spec("batchnorm_backward"),
        cases.rng("kink"),
        {"N": 65, "C": 33},
        FLOAT32,
        {"activation": "relu"},
        ("slope", "dslope"),
    )
    named = forward.named()
    at_zero = named["mean"] - named["beta"] / (named["gamma"] * named["inv_std"])
    x = named["x"].copy()
    x[0] = at_zero
    assert checks.is_ill_conditioned(forward.having(x=x))
