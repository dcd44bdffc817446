"""What the contract tests run: sizes from the tile, draws that fit together, layouts; all of it from the registry.

A `Call` is an op with arrays, parameters and run-time values. The arrays of a backward op are those of its forward op:
drawn for it, run through its float64 reference, looked up by name; upstream gradients are drawn at random.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import product
from typing import Any

import numpy as np

from fastdl.kernels import registry
from fastdl.kernels.registry import OpSpec

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

#: Around the tile (a panel has 32 columns; vectors 4 to 16 lanes, dropout draws 8): one, primes, below, equal, above.
LENGTHS = (1, 2, 7, 13, 31, 32, 33, 63, 64, 65, 100, 257)

#: Run-time values of a step in the middle of training, and of one whose rows count past 2^32.
STEPS = (
    {"step": 3, "epoch": 2, "first_row": 5, "total_rows": 0, "offset": 0, "update": 2, "lr": 0.01, "scale": 1.0},
    {
        "step": 70_000,
        "epoch": 70_001,
        "first_row": (1 << 32) - 2,
        "total_rows": 1000,
        "offset": 11,
        "update": 60_000,
        "lr": 0.1,
        "scale": 0.625,
    },
)


@dataclass(frozen=True)
class Call:
    """One op with everything it needs; ``arrays`` are plain, outputs hold NaN."""

    spec: OpSpec
    sizes: Mapping[str, int]
    dtype: np.dtype
    arrays: tuple[np.ndarray | None, ...]
    arguments: Mapping[str, Any]
    #: redraw(k) is this call with other random values
    redraw: Callable[[int], Call | None] | None = None

    def __str__(self) -> str:
        absent = [a.name for a, x in zip(self.spec.arrays, self.arrays, strict=True) if x is None]
        without = f", without {', '.join(absent)}" if absent else ""
        return f"{self.spec.name} {self.dtype} {dict(self.sizes)} {dict(self.arguments)}{without}"

    def named(self) -> dict[str, np.ndarray | None]:
        return {a.name: x for a, x in zip(self.spec.arrays, self.arrays, strict=True)}

    def having(self, **arrays: np.ndarray) -> Call:
        """The same call with other arrays, by name."""
        every = tuple(arrays.get(name, x) for name, x in self.named().items())
        return replace(self, arrays=every, redraw=None)

    def reference(self, dtype: Any = np.float64) -> list[np.ndarray | None]:
        """The arrays after the reference ran on copies of them in float64 (or another dtype)."""
        copies: list[np.ndarray | None] = []
        for array, x in zip(self.spec.arrays, self.arrays, strict=True):
            copies.append(None if x is None else x.astype(dtype if array.dtype == "T" else x.dtype))
        self.spec.reference(*copies, **self.arguments)
        return copies

    @cached_property
    def want(self) -> list[np.ndarray | None]:
        """What the arrays should hold afterwards: the reference's in float64, in the op's own dtype if exact."""
        exact = {name for name, tolerance in self.spec.tolerances(self.sizes).items() if tolerance.exact}
        wide = self.reference() if len(exact) < len(self.spec.outputs) else None
        if not exact:
            return wide
        own = self.reference(self.dtype)
        if wide is None:
            return own
        return [b if a.name in exact else w for a, w, b in zip(self.spec.arrays, wide, own, strict=True)]


def rng(*seeds: object) -> np.random.Generator:
    """A generator that depends on the arguments' text alone."""
    return np.random.default_rng(zlib.crc32(repr(seeds).encode()))


# ---------------------------------------------------------------------------------------------- sizes
def sizes(spec: OpSpec, full: bool = False) -> list[dict[str, int]]:
    """Sizes of the op's letters: every length with other lengths of the other letters, one and nothing.

    The slice for CI rotates the lists of lengths against each other once, the full matrix takes every pair (every
    second rotation for three letters).
    """
    letters, n = spec.letters, len(LENGTHS)
    if not letters:
        return [{}]
    if full and len(letters) == 2:
        found = [dict(zip(letters, pair, strict=True)) for pair in product((0, *LENGTHS), repeat=2)]
    else:
        found = []
        for turn in range(0, n, 2) if full else (0,):
            for k in range(n):
                # 5 and 7 have no factor in common with 12: each letter walks through all lengths, in its own order
                lengths = (LENGTHS[k], LENGTHS[(5 * k + 4 + turn) % n], LENGTHS[(7 * k + 9 + 2 * turn) % n])
                found.append(dict(zip(letters, lengths, strict=False)))
        for k, letter in enumerate(letters):
            for length in (0, 1):
                found.append({other: length if other == letter else 33 + j - k for j, other in enumerate(letters)})
    if len(letters) == 1:
        found.append({letters[0]: 5003})  # more than one block of a flat array
    return found


def variants(spec: OpSpec) -> tuple[Mapping[str, Any], ...]:
    return tuple(spec.variants) or ({},)


def absences(spec: OpSpec) -> list[tuple[str, ...]]:
    """Optional arrays to leave out: none of them, all of them, each alone.

    The gradient of an array that is absent is absent.
    """
    optional = [a.name for a in spec.arrays if a.optional]
    gradients = {f"d{name}" for name in optional} & set(optional)
    chosen: list[tuple[str, ...]] = [(), tuple(optional), *((name,) for name in optional)]
    closed = [tuple(sorted({*names, *(f"d{n}" for n in names if f"d{n}" in gradients)})) for names in chosen]
    return list(dict.fromkeys(closed))


# ---------------------------------------------------------------------------------------------- draws
def forward_of(spec: OpSpec) -> OpSpec | None:
    """The op whose gradients this one gives; None for the others."""
    return next((s for s in registry.specs() if spec.name in s.gradients and s is not spec), None)


def known_to(spec: OpSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that an op has."""
    names = {p.name for p in spec.params} | set(spec.runtime)
    return {name: value for name, value in arguments.items() if name in names}


def draw(
    spec: OpSpec,
    seed: np.random.Generator,
    size: Mapping[str, int],
    dtype: np.dtype,
    variant: Mapping[str, Any],
    without: tuple[str, ...] = (),
    step: Mapping[str, Any] = STEPS[0],
) -> Call | None:
    """A call of the op on drawn arrays; None if this is outside the op's domain.

    Outside the domain is what the reference refuses (an empty axis, an optional array that the variant cannot miss) or
    where it is not defined (the mean of nothing).
    """
    arguments = {**variant, **{name: step[name] for name in spec.runtime}}
    forward = forward_of(spec)
    refusals: tuple[type[Exception], ...] = ()
    if without:
        refusals += (ValueError, TypeError)
    if 0 in size.values():
        refusals += (ValueError, IndexError, ZeroDivisionError, RuntimeWarning)
    try:
        if forward is None:
            arrays = spec.make(seed, size, dtype, without)
        else:
            arrays = _backward_arrays(spec, forward, seed, size, dtype, without, arguments)
        call = Call(spec, size, dtype, tuple(_poisoned(spec, arrays)), arguments)
        call.want  # noqa: B018  (computed once, kept)
        if 0 in size.values() and not all(np.isfinite(x).all() for x in call.want if x is not None):
            return None
    except refusals:
        return None
    return call


def _poisoned(spec: OpSpec, arrays: list[np.ndarray | None]) -> Iterator[np.ndarray | None]:
    """Outputs with every bit set: NaN, or -1."""
    for array, x in zip(spec.arrays, arrays, strict=True):
        if x is not None and array.role == "out" and x.dtype.kind != "b":
            x.reshape(-1).view(np.uint8)[...] = 0xFF
        yield x


def _agreeing(spec: OpSpec, forward: OpSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A backward op's arguments, and those that its forward op alone has: from the variant that says the same."""
    said = spec.defaults() | dict(arguments)
    for variant in variants(forward):
        whole = forward.defaults() | variant
        if all(said.get(name, value) == value for name, value in whole.items()):
            return {**variant, **arguments}
    return dict(arguments)


def _backward_arrays(
    spec: OpSpec,
    forward: OpSpec,
    seed: np.random.Generator,
    size: Mapping[str, int],
    dtype: np.dtype,
    without: tuple[str, ...],
    arguments: Mapping[str, Any],
) -> list[np.ndarray | None]:
    arguments = _agreeing(spec, forward, arguments)
    known = {a.name for a in forward.arrays if a.optional}
    made = forward.make(seed, size, dtype, tuple(n for n in without if n in known))
    call = Call(forward, size, dtype, tuple(made), known_to(forward, arguments))
    after = call.reference()
    values: dict[str, np.ndarray | None] = {}
    for array, before, x in zip(forward.arrays, made, after, strict=True):
        kept = before if array.role != "out" else x
        values[array.name] = None if kept is None else kept.astype(before.dtype)
    upstream = {f"d{a.name}" for a in forward.outputs}
    own = dict(zip((a.name for a in spec.arrays), spec.make(seed, size, dtype, without), strict=True))
    for array in spec.arrays:
        if array.role != "out" and array.name not in upstream and values.get(array.name) is not None:
            own[array.name] = values[array.name]
    return list(own.values())


def _numbered(
    spec: OpSpec,
    size: Mapping[str, int],
    dtype: np.dtype,
    variant: Mapping[str, Any],
    without: tuple[str, ...],
    step: Mapping[str, Any],
    number: int,
) -> Call | None:
    seed = rng(spec.name, str(dtype), sorted(size.items()), sorted(variant.items()), without, number)
    return draw(spec, seed, size, dtype, variant, without, step)


@lru_cache(maxsize=2)
def slice_of(spec_name: str, dtype: np.dtype) -> list[Call]:
    """The calls of the slice for CI, kept for the back ends that come next."""
    return list(_calls(registry.spec(spec_name), dtype, full=False))


def calls(spec: OpSpec, dtype: np.dtype, full: bool = False) -> Iterable[Call]:
    """Calls of an op for one dtype: sizes x variants x absent arrays x steps, thinned out unless ``full``.

    Every variant meets every optional array absent and present; every size meets some variant.
    """
    return _calls(spec, dtype, full) if full else slice_of(spec.name, dtype)


def _calls(spec: OpSpec, dtype: np.dtype, full: bool) -> Iterator[Call]:
    ways = list(product(variants(spec), absences(spec)))
    found = {k: 0 for k in range(len(ways))}
    turn = 0
    for j, size in enumerate(sizes(spec, full)):
        some = ways if full else [ways[(turn + i) % len(ways)] for i in range(min(len(ways), 6))]
        turn += len(some)
        for variant, without in some:
            step = STEPS[j % 2]
            redraw = partial(_numbered, spec, size, dtype, variant, without, step)
            call = redraw(0)
            if call is not None:
                found[ways.index((variant, without))] += 1
                yield replace(call, redraw=redraw)
    for k, (variant, without) in enumerate(ways):
        if not without and not found[k]:
            raise AssertionError(f"{spec.name}: no size was in the domain of variant {dict(variant)}")


def is_product(spec: OpSpec) -> bool:
    """Three matrices that share one letter two by two: a dense product, whose inputs may be transposed views."""
    pairs = {frozenset(a.letters) for a in spec.arrays if len(a.letters) == 2}
    return len(pairs) == 3 and len(frozenset.union(*pairs)) == 3
