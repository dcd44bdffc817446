"""The checks of the contract, as functions that raise AssertionError; the tests beside this file run them.

They know no op by name. `test_planted_faults.py` proves that each of them can turn red.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastdl.kernels import dispatch, registry
from fastdl.kernels.registry import Array, OpSpec, Tolerance

from . import cases, layouts
from .cases import Call

#: Draws that may be thrown away because a rounding error moves an element across a kink.
DRAWS = 4
#: Share of an array's largest value that a tolerance may reach: below, a turned sign shows, and a missing term.
MOST_OF_A_VALUE = 0.02


def bits(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


# ---------------------------------------------------------------------------------------------- running a call
def run(
    call: Call, backend: str, threads: int = 1, layout: str = "plain", same: Sequence[tuple[str, str]] = ()
) -> dict[str, np.ndarray | None]:
    """The arrays after a back end ran the call on copies in a layout.

    Raises if an input or memory around an array has changed. ``same`` pairs an input with the output that is the same
    array.
    """
    spec = call.spec
    placed = dict(
        zip(
            (a.name for a in spec.arrays), layouts.place(spec, call.arrays, layout, cases.is_product(spec)), strict=True
        )
    )
    for source, target in same:
        placed[target] = placed[source]
    arguments = [None if p is None else p.argument() for p in placed.values()]
    dispatch.run(spec.name, *arguments, backend=backend, threads=threads, **call.arguments)
    after: dict[str, np.ndarray | None] = {}
    overwritten = {source for source, _ in same}
    for array, before in zip(spec.arrays, call.arrays, strict=True):
        p = placed[array.name]
        if array.name in overwritten:
            after[array.name] = None
            continue
        try:
            after[array.name] = None if p is None else p.read()
        except AssertionError as error:
            raise AssertionError(f"{backend}, {layout}: {call}: {array.name}: {error}") from None
        if array.role == "in" and p is not None and bits(after[array.name]) != bits(before):
            raise AssertionError(f"{backend}, {layout}: {call}: the input {array.name} was modified")
    return after


# ---------------------------------------------------------------------------------------------- closeness
def largest(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return float(finite.max(initial=0.0))


def allowed(want: np.ndarray, dtype: np.dtype, tolerance: Tolerance, inputs: float = 0.0) -> np.ndarray:
    """Largest error of each element of a result.

    In float64 twice the op's tolerance, for the reference errs as well; below the normal numbers one of these. Where
    all of a result cancels to 0, its norm is that of the largest of the ``inputs``.
    """
    info = np.finfo(dtype)
    norm = largest(want) or inputs
    factor = 2.0 if dtype == np.float64 else 1.0
    with np.errstate(invalid="ignore"):
        return factor * info.eps * (tolerance.ulp * np.abs(want) + tolerance.norm * norm) + info.smallest_normal


def difference(
    got: np.ndarray, want: np.ndarray, dtype: np.dtype, tolerance: Tolerance, inputs: float = 0.0
) -> str | None:
    """What is wrong with a result, or None."""
    if got.shape != want.shape:
        return f"expected shape {want.shape}, found {got.shape}"
    if not got.size:
        return None
    if got.dtype.kind != "f" or tolerance.exact:
        wrong = (got != want) & ~((got != got) & (want != want))  # NaN equals NaN, the sign of zero is free
        at = np.unravel_index(int(np.argmax(wrong)), got.shape)
        return f"expected exactly {want[at]!r} at {_place(at)}, found {got[at]!r}" if wrong.any() else None
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float64) - want)
        limit = allowed(want, dtype, tolerance, inputs)
        odd = ~np.isfinite(want)
        right = np.where(odd, (got == want) | (np.isnan(got) & np.isnan(want)), error <= limit)
    if right.all():
        return None
    excess = np.where(right, -1.0, np.where(np.isfinite(error), error / limit, np.inf))
    at = np.unravel_index(int(np.argmax(excess)), got.shape)
    return (
        f"{int((~right).sum())} of {got.size} elements differ, the worst at {_place(at)}: expected {want[at]!r}, found "
        f"{got[at]!r}, {excess[at]:.3g} times the tolerance ({tolerance.why})"
    )


def too_wide(want: np.ndarray, dtype: np.dtype, tolerance: Tolerance) -> str | None:
    """Why a tolerance checks nothing: what it allows is not below the largest value that is wanted."""
    top = largest(want)
    if want.dtype.kind != "f" or not top:
        return None
    share = float(allowed(want, dtype, tolerance).max()) / top
    if share < MOST_OF_A_VALUE:
        return None
    return f"the tolerance allows {share:.3g} times the largest value that is wanted ({tolerance.why})"


def _place(at: tuple[Any, ...]) -> str:
    return str(tuple(int(i) for i in at))


def compare(call: Call, got: Mapping[str, np.ndarray | None]) -> str | None:
    """What is wrong with the outputs of a call, or None."""
    tolerances = call.spec.tolerances(call.sizes)
    dtype = call.dtype if any(a.dtype == "T" for a in call.spec.arrays) else np.dtype(np.float64)
    inputs = max(
        (largest(x) for a, x in zip(call.spec.arrays, call.arrays, strict=True) if _is_float_input(a, x)), default=0
    )
    for array, want in zip(call.spec.arrays, call.want, strict=True):
        if array.role == "in" or want is None:
            continue
        if want.dtype.kind == "f" and not np.isfinite(want).all():
            return f"{array.name}: the reference itself left or made values that are not finite"
        tolerance = tolerances[array.name]
        wrong = too_wide(want, dtype, tolerance) or difference(got[array.name], want, dtype, tolerance, inputs)
        if wrong:
            return f"{array.name}: {wrong}"
    return None


def _is_float_input(array: Array, x: np.ndarray | None) -> bool:
    return x is not None and array.role != "out" and x.dtype.kind == "f"


def is_ill_conditioned(call: Call) -> bool:
    """Whether a rounding error of the inputs changes the reference by far more than the tolerance: a kink is near."""
    tolerances = call.spec.tolerances(call.sizes)
    if all(tolerance.exact for tolerance in tolerances.values()):
        return False  # the same inputs, the same comparisons
    wanted = call.want
    for k in range(4):
        seed = cases.rng(str(call), k)
        moved = []
        for array, x in zip(call.spec.arrays, call.arrays, strict=True):
            if _is_float_input(array, x):
                x = x.astype(np.float64) * (1 + 4 * np.finfo(call.dtype).eps * seed.choice((-1.0, 1.0), x.shape))
            moved.append(x)
        other = replace(call, arrays=tuple(moved)).reference()
        for array, a, b in zip(call.spec.arrays, other, wanted, strict=True):
            if array.role == "in" or b is None or b.dtype.kind != "f":
                continue
            if (np.abs(a - b) > 16 * allowed(b, call.dtype, tolerances[array.name])).any():
                return True
    return False


# ---------------------------------------------------------------------------------------------- checks
def matches_reference(call: Call, backend: str, threads: int = 1, layout: str = "plain") -> None:
    """Outputs within the op's tolerance of the float64 reference, fully written; inputs and surroundings untouched."""
    for k in range(1, DRAWS + 1):
        wrong = compare(call, run(call, backend, threads, layout))
        if wrong is None:
            return
        again = call.redraw(k) if k < DRAWS and call.redraw is not None and is_ill_conditioned(call) else None
        if again is None:
            raise AssertionError(f"{backend}, {threads} threads, {layout}: {call}: {wrong}")
        call = replace(again, redraw=call.redraw)


def takes_alias(call: Call, backend: str, pair: tuple[str, str], layout: str = "plain") -> None:
    """The output may be the very input: same bits as with an output of its own (and right ones)."""
    source, target = pair
    named = call.named()
    apart = run(call, backend, layout=layout)
    together = run(call, backend, layout=layout, same=[pair])
    assert named[source].shape == named[target].shape, f"{call}: {source} and {target} differ in shape"
    for array in call.spec.outputs:
        a, b = apart[array.name], together[array.name]
        if a is not None and bits(a) != bits(b):
            raise AssertionError(f"{backend}, {layout}: {call}: {array.name} differs where {target} is {source}")


def same_bits(call: Call, backend: str, teams: Sequence[int], layout: str = "plain") -> None:
    """Every run gives the same bits; ``teams`` lists the number of threads of each run."""
    first = run(call, backend, teams[0], layout)
    for threads in teams[1:]:
        other = run(call, backend, threads, layout)
        for name, x in first.items():
            if x is not None and bits(x) != bits(other[name]):
                raise AssertionError(
                    f"{backend}, {layout}: {call}: {name} differs between {teams[0]} and {threads} threads"
                )


def is_as_plain(call: Call, backend: str, layout: str) -> None:
    """A layout gives what plain rows give, within the op's tolerance."""
    want, got = run(call, backend), run(call, backend, layout=layout)
    tolerances = call.spec.tolerances(call.sizes)
    for array in call.spec.outputs:
        if want[array.name] is not None:
            value = want[array.name]
            value = value.astype(np.float64) if value.dtype.kind == "f" else value
            wrong = difference(got[array.name], value, call.dtype, tolerances[array.name])
            if wrong:
                raise AssertionError(f"{backend}, {layout}: {call}: {array.name}: {wrong}")


# ---------------------------------------------------------------------------------------------- special values
def special_call(spec: OpSpec, dtype: np.dtype) -> Call:
    """The table's values of x in every lane of a vector and in the tail: rows that begin one value later each."""
    xs = np.array([x for x, _ in spec.special], np.float64)
    length = 2 * len(xs) + 33
    x = np.stack([np.resize(np.roll(xs, -k), length) for k in range(len(xs))]).astype(dtype)
    sizes = {letter: n for letter, n in zip(spec.inputs[0].letters, x.shape, strict=True)}
    seed = cases.rng(spec.name)
    call = Call(spec, sizes, dtype, tuple(spec.make(seed, sizes, dtype)), {})
    return call.having(**{spec.inputs[0].name: x})


def special_values(spec: OpSpec, backend: str, dtype: np.dtype, layout: str = "plain") -> None:
    """The op's table of infinities, NaN, zeros and kinks; the sign of a zero is free."""
    call = special_call(spec, dtype)
    x = call.arrays[spec.arrays.index(spec.inputs[0])]
    out = spec.outputs[0].name
    got = run(call, backend, layout=layout)[out]
    info = np.finfo(dtype)
    tolerance = spec.tolerances(call.sizes)[out]
    for value, want in spec.special:
        here = np.isnan(x) if np.isnan(value) else (x == dtype.type(value)) & (np.signbit(x) == np.signbit(value))
        assert here.any(), f"{spec.name}: {value} is not in the table's array"
        found = got[here]
        if np.isnan(want):
            right = np.isnan(found)
        elif np.isinf(want) or want == 0:
            right = found == want
        else:
            limit = (tolerance.ulp + 1) * info.eps * abs(want) + tolerance.norm * info.eps + info.smallest_subnormal
            right = np.abs(found.astype(np.float64) - want) <= limit
        if not right.all():
            raise AssertionError(
                f"{backend}, {layout}: {spec.name} {dtype}: expected {want} at {value}, found {found[~right][0]!r}"
            )


# ---------------------------------------------------------------------------------------------- gradients
GRADIENT_TOLERANCE = 1e-8
STEP = 1e-3  # of fourth-order differences: their error is about 1e-12 here, their rounding about 1e-13
MOST_ELEMENTS = 48  # of a tensor that are differentiated numerically


def gives_own_gradient(spec: OpSpec) -> bool:
    """Value and gradient in one op: it writes d<input> and is no backward op."""
    names = {a.name for a in spec.inputs}
    return cases.forward_of(spec) is None and any(a.name[:1] == "d" and a.name[1:] in names for a in spec.outputs)


def has_gradient(spec: OpSpec) -> bool:
    return bool(spec.gradients) or gives_own_gradient(spec)


def gradient_calls(spec: OpSpec) -> Iterator[Call]:
    """Small float64 calls of a forward op for every variant that its backward ops know, optional arrays in and out."""
    shapes = ({"N": 5, "C": 7, "I": 4, "O": 6}, {"N": 3, "C": 37, "I": 35, "O": 33}, {"N": 1, "C": 2, "I": 1, "O": 1})
    backward = [registry.spec(name) for name in spec.gradients]
    for variant in cases.variants(spec):
        choices = {p.name: p.default for p in spec.params if p.kind == "activation"}
        if any(
            variant.get(name, default) != default and name not in cases.known_to(b, {name: 0})
            for b in backward
            for name, default in choices.items()
        ):
            continue
        for without in cases.absences(spec):
            if any(f"d{a.name}" in without for a in spec.inputs):
                continue
            for shape in shapes:
                size = {letter: shape.get(letter, 11) for letter in spec.letters}
                seed = cases.rng("gradient", spec.name, sorted(variant.items()), without, sorted(size.items()))
                call = cases.draw(spec, seed, size, np.dtype(np.float64), variant, without)
                if call is not None:
                    yield call


def analytic(call: Call, backend: str, upstream: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients by the op's backward ops on a back end, from arrays that the float64 reference's forward pass left."""
    values: dict[str, Any] = {}
    for array, before, after in zip(call.spec.arrays, call.arrays, call.want, strict=True):
        values[array.name] = after if array.role == "out" else before
    values |= {f"d{name}": dy for name, dy in upstream.items()}
    if not call.spec.gradients:
        return {n: x for n, x in run(call, backend).items() if n.startswith("d") and n[1:] in values and x is not None}
    found: dict[str, np.ndarray] = {}
    for name in call.spec.gradients:
        spec = registry.spec(name)
        seed = cases.rng("backward", str(call))
        made = spec.make(seed, call.sizes, call.dtype)
        arrays = []
        for array, own in zip(spec.arrays, made, strict=True):
            if array.role == "out":
                absent = array.optional and array.name.startswith("d") and values.get(array.name[1:], 0) is None
                arrays.append(None if absent else own)
            elif array.name in values:
                arrays.append(values[array.name])
            else:
                raise AssertionError(f"{name} needs {array.name!r}, which {call.spec.name} neither takes nor gives")
        back = Call(spec, call.sizes, call.dtype, tuple(arrays), cases.known_to(spec, call.arguments))
        after = run(back, backend)
        found |= {a.name: after[a.name] for a in spec.outputs if after[a.name] is not None}
    return found


def objective(call: Call, upstream: Mapping[str, np.ndarray], name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Terms whose sum is differentiated, as a function of one input: dy * y, or the first value of an op that gives its
    own gradient. Differences are taken term by term, which rounds less than a difference of sums."""

    def terms(x: np.ndarray) -> np.ndarray:
        after = call.having(**{name: x}).reference()
        named = {a.name: value for a, value in zip(call.spec.arrays, after, strict=True)}
        if not upstream:
            return named[call.spec.outputs[0].name].reshape(-1)[:1]
        return np.concatenate([(dy * named[y]).reshape(-1) for y, dy in upstream.items()])

    return terms


def numeric(terms: Callable[[np.ndarray], np.ndarray], x: np.ndarray, at: tuple[int, ...]) -> tuple[float, bool]:
    """Fourth-order central difference of sum(terms) by x[at], and whether a kink is near (two steps disagree)."""

    def slope(h: float) -> float:
        def moved(by: float) -> np.ndarray:
            other = x.copy()
            other[at] += by
            return terms(other)

        return float((8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))).sum() / (12 * h))

    coarse, fine = slope(STEP), slope(STEP / 2)
    return fine, abs(coarse - fine) > 1e-7 * max(1.0, abs(fine))


def gradients(call: Call, backend: str, seen: dict[str, int] | None = None) -> None:
    """Analytic against numeric gradients: max|a - n| / max(1, max|a|) of every tensor."""
    spec = call.spec
    seed = cases.rng("upstream", str(call))
    backward_inputs = {a.name for name in spec.gradients for a in registry.spec(name).inputs}
    upstream = {
        a.name: seed.standard_normal(x.shape)
        for a, x in zip(spec.arrays, call.arrays, strict=True)
        if a.role == "out" and f"d{a.name}" in backward_inputs and x is not None
    }
    found = analytic(call, backend, upstream)
    for array, x in zip(spec.arrays, call.arrays, strict=True):
        if x is None or array.role == "out" or array.dtype != "T" or array.name in spec.no_gradient:
            continue
        gradient = found.get(f"d{array.name}")
        if gradient is None:
            raise AssertionError(f"{spec.name}: no op of {spec.gradients or (spec.name,)} gives d{array.name}")
        assert gradient.shape == x.shape, (
            f"{spec.name}: d{array.name} has shape {gradient.shape}, {array.name} {x.shape}"
        )
        places = list(np.ndindex(x.shape))
        some = seed.permutation(len(places))[:MOST_ELEMENTS]
        terms = objective(call, upstream, array.name)
        top, near_kink, worst, where = max(1.0, float(np.abs(gradient).max(initial=0))), 0, -1.0, ""
        for k in some:
            at = places[int(k)]
            if array is spec.inputs[0] and any(abs(x[at] - kink) <= 2 * STEP for kink in spec.kinks):
                near_kink += 1
                continue
            n, kink = numeric(terms, x, at)
            if kink:
                near_kink += 1
                continue
            error = abs(gradient[at] - n) / top
            if not error <= worst:
                worst, where = error, f"analytic {gradient[at]!r}, numeric {n!r} at {_place(at)}"
        if seen is not None:
            seen[array.name] = max(seen.get(array.name, 0), len(some) - near_kink)
        if near_kink > max(2, len(some) // 4):
            raise AssertionError(f"{call}: d{array.name}: {near_kink} of {len(some)} elements are near a kink")
        if where and not worst <= GRADIENT_TOLERANCE:
            raise AssertionError(f"{backend}: {call}: d{array.name} is off by {worst:.3g} (1e-8 allowed): {where}")


def gradient_arrays(spec: OpSpec) -> list[Array]:
    """Inputs that must have a gradient."""
    return [a for a in spec.inputs if a.dtype == "T" and a.name not in spec.no_gradient]


# ---------------------------------------------------------------------------------------------- refusals
def refuses(
    function: Callable[[], Any],
    kinds: type[Exception] | tuple[type[Exception], ...],
    words: Sequence[str],
    untouched: Sequence[np.ndarray] = (),
) -> None:
    """The call raises one of the errors, its message has the words, and no array has changed."""
    before = [bits(x) for x in untouched]
    try:
        function()
    except kinds as error:
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"the message lacks {missing}: {error}") from None
    else:
        raise AssertionError(f"expected {kinds}, but the call went through")
    for k, (x, b) in enumerate(zip(untouched, before, strict=True)):
        if bits(x) != b:
            raise AssertionError(f"array {k} was written before the error")
