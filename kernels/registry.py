"""What an op is (``OpSpec``) and who implements it (``Impl``).

An ``OpSpec`` describes an op once: arrays in order, parameters, reference, domain, tolerance, cost. Contract tests,
benches, the roofline report, the Program's printout and the marshaller of compiled calls all read it, and none of them
knows an op by name. This file imports no compiler.

Every implementation of an op is called the same way::

    impl(*arrays, **params, **runtime, threads=1)

``arrays`` stand in the order of ``OpSpec.arrays``, outputs included (allocated by the caller), ``None`` for an absent
optional one. ``params`` are fixed when a Program is bound, ``runtime`` values come from the step's run block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BACKENDS = ("cython", "numba", "numpy")  # in the order of preference of "auto"
ALL_BACKENDS = (*BACKENDS, "cuda")  # "auto" stays on the CPU, where the caller's arrays are
#: The run-time block. ``step`` and ``epoch`` are positions in the random streams, ``update`` is the age of the moments,
#: ``scale`` a factor of the gradient.
RUNTIME = ("step", "epoch", "first_row", "total_rows", "offset", "update", "lr", "scale")
DTYPES = {"T": None, "f8": np.float64, "i8": np.int64, "u4": np.uint32, "u1": np.bool_}


@dataclass(frozen=True)
class Array:
    """One array of an op.

    Parameters
    ----------
    name : str
        Name in the signature. A gradient of ``x`` is called ``dx``; a backward op names what it shares with its
        forward op by the same name.
    shape : str
        Letters of the dimensions, e.g. ``"N,I"``; a number stands for itself (``"3"``).
    role : {"in", "out", "inout"}
    optional : bool
        ``None`` is accepted.
    dtype : {"T", "f8", "i8", "u4", "u1"}
        ``"T"`` is the op's float type.
    single : bool
        Float32 where matrices are bfloat16 (CUDA): parameters and their gradients, statistics, targets and weights of
        a loss. A sum of many steps needs more than 8 bits.
    fill : callable, optional
        ``fill(rng, shape, dtype, made) -> array`` draws a value from the op's domain; ``made`` maps the names of the
        arrays drawn before to their values. Standard normal values (or zeros for integers) when missing.
    """

    name: str
    shape: str
    role: str = "in"
    optional: bool = False
    dtype: str = "T"
    single: bool = False
    fill: Callable[..., np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.role not in ("in", "out", "inout"):
            raise ValueError(f"array {self.name!r}: role must be in, out or inout, found {self.role!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"array {self.name!r}: dtype must be one of {sorted(DTYPES)}, found {self.dtype!r}")

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(self.shape.split(",")) if self.shape else ()

    def dims(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape for given sizes of the letters."""
        return tuple(int(s) if s.isdigit() else sizes[s] for s in self.letters)


@dataclass(frozen=True)
class Param:
    """A parameter that is fixed when a call is bound. ``kind`` is "float", "int", "seed" or "activation"."""

    name: str
    kind: str
    default: Any

    def __post_init__(self) -> None:
        if self.kind not in ("float", "int", "seed", "activation"):
            raise ValueError(f"parameter {self.name!r}: unknown kind {self.kind!r}")


@dataclass(frozen=True)
class Tolerance:
    """How far a float result may be from the float64 reference: eps * (ulp * |want| + norm * max|want|).

    ``why`` is the argument for the numbers. It must stay below the largest value that it is held against: the contract
    tests refuse a tolerance that any result would meet.
    """

    ulp: float = 4.0
    norm: float = 0.0
    why: str = "one rounding per operation"

    @property
    def exact(self) -> bool:
        """Whether results are to be those of the reference bit for bit, but for the sign of a zero."""
        return not (self.ulp or self.norm)


@dataclass(frozen=True)
class OpSpec:
    """One op, described once. See the module docstring for the calling convention."""

    name: str
    family: str
    summary: str
    arrays: tuple[Array, ...]
    reference: Callable[..., None]
    params: tuple[Param, ...] = ()
    runtime: tuple[str, ...] = ()
    #: tolerance(sizes) -> the Tolerance of all outputs, or one for each by its name
    tolerance: Callable[[Mapping[str, int]], Tolerance | Mapping[str, Tolerance]] = field(
        default=lambda sizes: Tolerance()
    )
    #: parameter combinations that the contract tests run
    variants: tuple[Mapping[str, Any], ...] = ({},)
    #: names of the ops that give the gradients of this one's float inputs (checked by central differences)
    gradients: tuple[str, ...] = ()
    #: inputs for which the gradient is not defined by the op's contract (running statistics, weights of a loss)
    no_gradient: tuple[str, ...] = ()
    #: ((x, alpha-less expected y), ...) for element-wise ops: infinities, NaN, signed zero, kinks
    special: tuple[tuple[float, float], ...] = ()
    #: points (of the first input) near which the op has a kink: gradient checks keep away from them
    kinks: tuple[float, ...] = ()
    #: pairs (input, output) that may be the same array
    aliases: tuple[tuple[str, str], ...] = ()
    #: initial values are drawn on the host, in float64, once: CUDA has no kernel for them
    on_host: bool = False
    #: column-local: column c of the outputs depends on column c of the inputs alone
    column_local: bool = False
    #: times that any schedule reads an array, where more than once: a sum over it comes before its elements' results
    passes: Mapping[str, int] = field(default_factory=dict)
    #: logical bytes moved and floating-point operations for given sizes
    bytes: Callable[[Mapping[str, int], int], float] | None = None
    flops: Callable[[Mapping[str, int]], float] = field(default=lambda sizes: 0.0)

    def __post_init__(self) -> None:
        names = [a.name for a in self.arrays]
        if len(set(names)) != len(names):
            raise ValueError(f"op {self.name!r}: an array name appears twice in {names}")
        unknown = [r for r in self.runtime if r not in RUNTIME]
        if unknown:
            raise ValueError(f"op {self.name!r}: unknown runtime values {unknown}, known: {RUNTIME}")

    @property
    def letters(self) -> tuple[str, ...]:
        """Dimension letters in order of appearance."""
        seen: dict[str, None] = {}
        for array in self.arrays:
            for letter in array.letters:
                if not letter.isdigit():
                    seen.setdefault(letter)
        return tuple(seen)

    @property
    def inputs(self) -> tuple[Array, ...]:
        return tuple(a for a in self.arrays if a.role != "out")

    @property
    def outputs(self) -> tuple[Array, ...]:
        return tuple(a for a in self.arrays if a.role != "in")

    def array(self, name: str) -> Array:
        for array in self.arrays:
            if array.name == name:
                return array
        raise KeyError(f"op {self.name!r} has no array {name!r}; it has {[a.name for a in self.arrays]}")

    def tolerances(self, sizes: Mapping[str, int]) -> dict[str, Tolerance]:
        """The tolerance of each output, by name."""
        names = [a.name for a in self.outputs]
        stated = self.tolerance(sizes)
        if isinstance(stated, Tolerance):
            return dict.fromkeys(names, stated)
        if set(stated) != set(names):
            raise ValueError(f"op {self.name!r}: expected a tolerance for each of {names}, found {sorted(stated)}")
        return dict(stated)

    def defaults(self) -> dict[str, Any]:
        return {p.name: p.default for p in self.params}

    def moved(self, sizes: Mapping[str, int], itemsize: int, absent: Collection[str] = ()) -> float:
        """Logical bytes: reads (``passes`` of an input) and writes of every array, unless the spec says otherwise."""
        if self.bytes is not None:
            return self.bytes(sizes, itemsize)
        total = 0
        for array in self.arrays:
            if array.name in absent:
                continue
            size = itemsize if array.dtype == "T" else np.dtype(DTYPES[array.dtype]).itemsize
            passes = self.passes.get(array.name, 1) + (array.role == "inout")
            total += int(np.prod(array.dims(sizes))) * size * passes
        return float(total)

    def make(
        self, rng: np.random.Generator, sizes: Mapping[str, int], dtype: Any, without: Sequence[str] = ()
    ) -> list[np.ndarray | None]:
        """Draw the arrays of one call; outputs come filled with NaN (or all ones bits)."""
        made: dict[str, np.ndarray | None] = {}
        for array in self.arrays:
            if array.name in without:
                made[array.name] = None
                continue
            kind = np.dtype(dtype if array.dtype == "T" else DTYPES[array.dtype])
            shape = array.dims(sizes)
            if array.role == "out":
                made[array.name] = np.full(shape, np.nan if kind.kind == "f" else 1, kind)
            elif array.fill is not None:
                made[array.name] = np.ascontiguousarray(array.fill(rng, shape, kind, made), dtype=kind)
            elif kind.kind == "f":
                made[array.name] = rng.standard_normal(shape).astype(kind)
            else:
                made[array.name] = np.zeros(shape, kind)
        return list(made.values())


@dataclass(frozen=True)
class Impl:
    """One implementation of an op on one back end.

    Parameters
    ----------
    op, backend : str
    fn : callable, optional
        The Python callable of the calling convention. Back ends with ``native`` kernels may leave it out.
    native : mapping dtype name -> capsule, optional
        ``fd_kernel_info`` of each dtype (see ``common/abi.h``), for the engine and the eager path.
    verifier : callable, optional
        ``verifier(arrays, params) -> reason or None``: why this implementation cannot take these arguments.
    launches : callable, optional
        CUDA: ``launches(views, params, planner) -> list of Launch`` (see ``common/gpu.py``).
    """

    op: str
    backend: str
    fn: Callable[..., None] | None = None
    native: Mapping[str, Any] | None = None
    verifier: Callable[..., str | None] | None = None
    launches: Callable[..., list[Any]] | None = None

    def __post_init__(self) -> None:
        if self.backend not in ALL_BACKENDS:
            raise ValueError(f"unknown back end {self.backend!r}, known: {ALL_BACKENDS}")
        if self.fn is None and self.native is None and self.launches is None:
            raise ValueError(f"{self.op} on {self.backend}: neither a callable nor kernels nor launches were given")


_specs: dict[str, OpSpec] = {}
_impls: dict[tuple[str, str], Impl] = {}


def register_op(spec: OpSpec) -> OpSpec:
    """Declare an op; its reference becomes the implementation of the ``numpy`` back end."""
    if spec.name in _specs:
        raise ValueError(f"op {spec.name!r} is declared twice")
    _specs[spec.name] = spec
    _impls[spec.name, "numpy"] = Impl(spec.name, "numpy", spec.reference)
    return spec


def register(impl: Impl) -> Impl:
    """Add an implementation of a declared op."""
    if impl.op not in _specs:
        raise ValueError(f"{impl.backend} implements {impl.op!r}, which no reference.py declares")
    if (impl.op, impl.backend) in _impls:
        raise ValueError(f"{impl.op!r} has two implementations on {impl.backend!r}")
    _impls[impl.op, impl.backend] = impl
    return impl


def spec(op: str) -> OpSpec:
    """The spec of an op; an unknown name lists the known ones."""
    try:
        return _specs[op]
    except KeyError:
        raise ValueError(f"unknown op {op!r}, known ops: {', '.join(sorted(_specs))}") from None


def specs() -> tuple[OpSpec, ...]:
    return tuple(_specs.values())


def find(op: str, backend: str) -> Impl | None:
    """The implementation of an op on a back end that has been loaded, or None."""
    return _impls.get((op, backend))
