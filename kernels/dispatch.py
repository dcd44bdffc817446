"""Who runs an op: `choose` by preference and verifier, `run` for one call, `explain` for people.

Dispatch happens once per eager call or once when a Program is bound, never inside a loop.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from fastdl.kernels import FAMILIES, registry
from fastdl.kernels.common import driver, fork
from fastdl.kernels.common.gpu import Planner, View, run_block
from fastdl.kernels.engine.panels import Panels
from fastdl.kernels.registry import ALL_BACKENDS, BACKENDS, Impl, OpSpec

#: File of a family that holds a back end's implementations.
MODULES = {"numpy": "reference", "numba": "numba_cpu", "cython": "_cython", "cuda": "numba_cuda"}

_state: dict[str, str] = {}  # back end -> "available" or the reason why not
_lock = threading.RLock()
fork.hold(_lock)  # half a back end cannot be loaded again


def load(backend: str) -> str:
    """Import a back end once; return "available" or the reason why it is not."""
    with _lock:
        if backend == "cuda":
            if why := _without_numba():
                return why
            load_cuda()
            return driver.missing() or "available"
        if backend not in _state:
            _state[backend] = _load(backend)
        return _state[backend]


def _modules(backend: str) -> list[Any]:
    """The families' modules of a back end, in order; a family may have none."""
    names = [f"fastdl.kernels.{family}.{MODULES[backend]}" for family in FAMILIES]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name) is not None]


def _load(backend: str) -> str:
    if backend != "numpy":
        load("numpy")
    if backend == "cython":
        if importlib.util.find_spec("fastdl.kernels.engine._cython") is None:
            return (
                "the compiled kernels are not in this installation (FASTDL_PURE=1 or no wheel for this platform); "
                "run `pip install .` with a C++ compiler"
            )
        from fastdl.kernels.common import simd

        made: list[tuple[str, Any]] = []
        for module in _modules(backend):
            simd.attach(module)
            made += module.kernels().items()
        for op, native in made:  # all or none: a family that cannot be loaded says so each time
            registry.register(Impl(op, "cython", native=native))
        return "available"
    if backend == "numba" and (why := _without_numba()):
        return why
    _modules(backend)
    return "available"


def _without_numba() -> str | None:
    """Why Numba cannot be used, or None. An installation that is broken or does not fit NumPy says so on import."""
    try:
        importlib.import_module("numba")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return "the package numba is not installed; run `pip install numba`"
        return f"the package numba cannot be imported ({error})"
    return None


def load_cuda() -> None:
    """Import what the CUDA kernels and their launches are; neither a GPU nor a package of CUDA is needed.

    Raises
    ------
    BackendUnavailable
        Without Numba, in whose types kernels are written.
    """
    from fastdl.errors import BackendUnavailable

    with _lock:
        if "cuda" not in _state:
            if why := _without_numba():
                raise BackendUnavailable(f"back end 'cuda' is not available: {why}")
            load("numpy")
            _modules("cuda")
            _state["cuda"] = "imported"


def backends() -> dict[str, str]:
    """Every back end with "available" or the reason why not."""
    return {name: load(name) for name in ALL_BACKENDS}


def candidate(op: str, backend: str, arrays: Sequence[Any] = (), params: Mapping[str, Any] | None = None) -> Impl | str:
    """The implementation on one back end, or the reason why there is none for these arguments."""
    load("numpy")
    registry.spec(op)
    if backend not in ALL_BACKENDS:
        raise ValueError(f"unknown back end {backend!r}, known: auto, {', '.join(ALL_BACKENDS)}")
    state = load(backend)
    if state != "available":
        return state
    impl = registry.find(op, backend)
    if impl is None:
        return f"{backend} has no kernel for {op}"
    if impl.verifier is not None:
        reason = impl.verifier(arrays, params or {})
        if reason:
            return reason
    return impl


def choose(op: str, backend: str, arrays: Sequence[Any] = (), params: Mapping[str, Any] | None = None) -> Impl:
    """The implementation that will run.

    Raises
    ------
    BackendUnavailable
        If an explicit back end cannot run the op; the message has the reason.
    """
    from fastdl.errors import BackendUnavailable

    if backend != "auto":
        found = candidate(op, backend, arrays, params)
        if isinstance(found, str):
            raise BackendUnavailable(f"back end {backend!r} cannot run {op}: {found}")
        return found
    for name in BACKENDS:
        found = candidate(op, name, arrays, params)
        if not isinstance(found, str):
            return found
    raise BackendUnavailable(f"no back end can run {op}")


def note(backend: str) -> str:
    """What a user should know of a back end that runs, in brackets; empty if nothing."""
    if backend != "numba":
        return ""
    from fastdl.kernels.common import numba_cpu

    why = "; ".join(numba_cpu.REFUSALS)
    if numba_cpu.FOLDER is None:
        return f" (compiled anew in every process, there is no folder to keep it in: {why})"
    return f" (compiled kernels are kept in {numba_cpu.FOLDER}: {why})" if why else ""


def explain(op: str, arrays: Sequence[Any], backend: str) -> str:
    """Which back end runs an op on these arrays, and why the others do not."""
    lines, taken = [], False
    for name in BACKENDS:
        found = candidate(op, name, arrays)
        if isinstance(found, str):
            lines.append(f"{name}: refused, {found}")
        elif backend not in ("auto", name):
            lines.append(f"{name}: could run it, but {backend!r} was asked for")
        elif taken:
            lines.append(f"{name}: could run it, comes later in the order {', '.join(BACKENDS)}")
        else:
            taken = True
            lines.append(f"{name}: runs it ({'asked for' if backend != 'auto' else 'first that can'}){note(name)}")
    return f"{op}\n" + "\n".join("  " + line for line in lines)


#: Float32 with products of bfloat16: a float type of Programs, not of arrays.
MIXED = "mixed_bfloat16"


def refuses(backend: str, dtype: str) -> str | None:
    """Why a back end cannot run Programs of a float type, or None."""
    state = load(backend)
    if state != "available":
        return state
    if backend == "cuda":
        return None if dtype in ("float32", MIXED) else "computes in float32, and in bfloat16 with float32 parameters"
    if dtype != MIXED:
        return None
    if backend != "cython":
        return "computes in float32 and float64 only"
    from fastdl.kernels.dense import _cython

    return _cython.no_bfloat16()


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """The values of some keys: in half the time of a loop over them."""
    if len(names) > 1:
        return itemgetter(*names)
    return (lambda params: (params[names[0]],)) if names else (lambda params: ())


class Marshaller:
    """Turns the calling convention of the registry into the flat arguments of a compiled kernel, for one op."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.defaults = {p.name: p.default for p in spec.params}
        kinds = {p.name: p.kind for p in spec.params if p.kind != "float"}
        self.ints = _getter(list(kinds))
        self.floats = _getter([p.name for p in spec.params if p.kind == "float"])
        self.activation = list(kinds.values()).index("activation") if "activation" in kinds.values() else None
        #: (array position, axis) that tells the number of rows
        self.rows_from = tuple((k, a.letters.index("N")) for k, a in enumerate(spec.arrays) if "N" in a.letters)
        #: position of the array whose dtype chooses the kernel
        self.typed = next((k for k, array in enumerate(spec.arrays) if array.dtype == "T"), None)

    def scalars(self, params: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Values of the whole-number and of the float parameters, in the order of the spec."""
        try:
            ints, floats = self.ints(params), self.floats(params)
        except KeyError:
            params = {**self.defaults, **params}
            ints, floats = self.ints(params), self.floats(params)
        at = self.activation
        return ints if at is None else (*ints[:at], _index(ints[at]), *ints[at + 1 :]), floats

    def rows(self, arrays: Sequence[Any]) -> int:
        for k, axis in self.rows_from:
            if arrays[k] is not None:
                return arrays[k].shape[axis]
        return 1

    def capsule(self, impl: Impl, arrays: Sequence[Any], dtype: Any = None, mixed: bool = False) -> Any:
        """The kernel for a float type; with ``mixed`` the one that rounds operands to bfloat16, where an op has it."""
        if mixed and MIXED in impl.native:
            return impl.native[MIXED]
        if dtype is None:
            dtype = np.float32 if self.typed is None else arrays[self.typed].dtype
        name = np.dtype(dtype).name
        try:
            return impl.native[name]
        except KeyError:
            raise TypeError(
                f"{impl.op}: expected dtype float32 or float64, found {name}; convert with astype"
            ) from None


_activations: dict[str | None, int] = {}  # positions in the compiled table; asking the module takes 0.5 us


def _index(activation: str | None) -> int:
    found = _activations.get(activation)
    if found is None:
        from fastdl.kernels.activations import _cython

        found = _activations[activation] = _cython.index(activation)
    return found


_marshallers: dict[str, Marshaller] = {}


def marshaller(op: str) -> Marshaller:
    found = _marshallers.get(op)
    if found is None:
        load("numpy")
        found = _marshallers[op] = Marshaller(registry.spec(op))
    return found


Caller = Callable[[Sequence[Any], Mapping[str, Any], int], None]


def caller(impl: Impl) -> Caller:
    """``call(arrays, arguments, threads)`` for one implementation: what an eager call costs beside the kernel."""
    if impl.launches is not None:
        return _device_caller(impl)
    if impl.native is None:
        return _python_caller(impl)
    from fastdl.kernels.engine import _cython as engine

    how = marshaller(impl.op)
    invoke, scalars, native, typed, rows = engine.invoke, how.scalars, impl.native, how.typed, how.rows
    runtime = [name for name in registry.RUNTIME if name in how.spec.runtime]
    by_dtype = {np.dtype(name): capsule for name, capsule in native.items() if name != MIXED}
    default = next(iter(native.values()))

    def call(arrays: Sequence[Any], arguments: Mapping[str, Any], threads: int) -> None:
        capsule = default if typed is None else by_dtype.get(arrays[typed].dtype)
        if capsule is None:
            how.capsule(impl, arrays)  # raises with the dtype that came
        ints, floats = scalars(arguments)
        values = {name: arguments[name] for name in runtime if name in arguments}
        invoke(capsule, tuple(arrays), ints, floats, rows(arrays), threads, **values)

    def plain_call(arrays: Sequence[Any], arguments: Mapping[str, Any], threads: int) -> None:
        capsule = by_dtype.get(arrays[typed].dtype)
        if capsule is None:
            how.capsule(impl, arrays)
        invoke(capsule, tuple(arrays), (), (), rows(arrays), threads)

    simple = typed is not None and not (how.spec.params or how.spec.runtime)
    return plain_call if simple else call


def _python_caller(impl: Impl) -> Caller:
    fn = impl.fn

    def call(arrays: Sequence[Any], arguments: Mapping[str, Any], threads: int) -> None:
        for a in arrays:
            if type(a) is Panels:
                raise TypeError(f"{impl.op}: panel layout is for the compiled back end, found it on {impl.backend}")
        with np.errstate(under="ignore"):  # as on the other back ends, whatever the caller has set for his own
            fn(*arrays, **arguments, threads=threads)

    return call


def _device_caller(impl: Impl) -> Caller:
    """Arrays in GPU memory as they are; NumPy arrays to the GPU and back, a copy of every input and output.

    The call comes back when the work is done, so nobody has to wait for a stream and temporary memory can go.
    """
    how = marshaller(impl.op)
    spec = how.spec

    def call(arrays: Sequence[Any], arguments: Mapping[str, Any], threads: int) -> None:
        params = {p.name: arguments.get(p.name, p.default) for p in spec.params}
        runtime = {name: arguments[name] for name in spec.runtime if name in arguments}
        gpu, taken = driver.current(), []

        def room(size: int) -> int:
            taken.append(gpu.allocate(size))
            return taken[-1]

        try:
            views = []
            for array, value in zip(spec.arrays, arrays, strict=True):
                if value is not None and array.dtype == "T" and value.dtype != np.float32:
                    raise TypeError(f"{impl.op}: CUDA kernels compute in float32, found {value.dtype}; use astype")
                if value is None or not isinstance(value, np.ndarray):
                    views.append(None if value is None else value.view(array.name))
                else:
                    views.append(_copied(value, room(value.nbytes), gpu))
            planner = Planner(_copied(run_block(rows=how.rows(arrays), **runtime), room(64), gpu), room)
            gpu.run(impl.launches(views, params, planner))
            for array, value, view in zip(spec.arrays, arrays, views, strict=True):
                if isinstance(value, np.ndarray) and array.role != "in":
                    value[...] = gpu.read(view.address, value.dtype, value.size).reshape(value.shape)
            gpu.synchronize()
        finally:
            for address in taken:
                gpu.free(address)

    return call


def _copied(array: np.ndarray, address: int, gpu: Any) -> View:
    gpu.write(address, np.ascontiguousarray(array))
    return View(address, array.shape, int(np.prod(array.shape[1:])), array.dtype)


#: (op, back end) -> the caller, the number of arrays, and the places of those that every call has
_callers: dict[tuple[str, str], tuple[Caller, int, tuple[int, ...]]] = {}


def _caller(op: str, backend: str, arrays: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    made = caller(choose(op, backend, arrays, arguments))
    declared = registry.spec(op).arrays
    found = made, len(declared), tuple(k for k, array in enumerate(declared) if not array.optional)
    if all(i is None or i.verifier is None for i in (registry.find(op, name) for name in BACKENDS)):
        _callers[op, backend] = found
    return found


def _incomplete(op: str, arrays: Sequence[Any]) -> TypeError:
    declared = registry.spec(op).arrays
    if len(arrays) != len(declared):
        names = ", ".join(array.name for array in declared)
        return TypeError(f"{op}: expected {len(declared)} arrays ({names}), found {len(arrays)}")
    name = next(a.name for a, x in zip(declared, arrays, strict=True) if x is None and not a.optional)
    return TypeError(f"{name}: expected an array, found None; {op} needs one")


def bound(op: str, backend: str, arrays: Sequence[Any], arguments: Mapping[str, Any]) -> Caller:
    """The caller of the implementation that will run; remembered unless it depends on the arguments.

    Raises
    ------
    TypeError
        Too few or too many arrays, or None for one that every call has: a kernel would take a pointer of it.
    """
    made, count, required = _callers.get((op, backend)) or _caller(op, backend, arrays, arguments)
    if len(arrays) != count:
        raise _incomplete(op, arrays)
    for k in required:
        if arrays[k] is None:
            raise _incomplete(op, arrays)
    return made


def call(impl: Impl, arrays: Sequence[Any], arguments: Mapping[str, Any], threads: int) -> None:
    """Run a chosen implementation."""
    caller(impl)(arrays, arguments, threads)


def run(op: str, *arrays: Any, backend: str = "auto", threads: int = 1, **arguments: Any) -> None:
    """Run one op on arrays that have been checked: the arrays of its spec in order, then params and runtime values.

    `Panels` are accepted by the compiled back end.
    """
    bound(op, backend, arrays, arguments)(arrays, arguments, threads)
