"""Everything of fastdl that speaks to numba-cuda: device intrinsics, and kernels compiled to PTX and cubin.

Kernels say ``gpu.load8(x, i)`` with ``from fastdl.kernels.common import numba_cuda as gpu``; Numba looks the name up
when it compiles, so this module and the kernels' files import without numba-cuda, and a plan of launches can be made
anywhere.

A float array is a raw pointer to float32 or to bfloat16 (stored in 16 bits); arithmetic is float32 in both cases. A
thread works on eight neighbours at a time: two accesses of 128 bits in float32, one in bfloat16, and the eight
columns of one Philox counter.

numba-cuda 0.30.4 is the last of its line, its successor is numba-cuda-mlir; under NumPy 2.5 it misses
``np.row_stack``.
"""

from __future__ import annotations

import importlib.util
import re
import types as python_types
from collections.abc import Callable
from typing import Any

import numpy as np

from fastdl.errors import BackendUnavailable
from fastdl.kernels.common.gpu import ROWS, Kernel

#: Why nothing can be compiled, or None.
MISSING = None if importlib.util.find_spec("numba_cuda") else "the package numba-cuda is not installed (extra: cuda)"
f4, i4, u4, i8 = np.float32, np.int32, np.uint32, np.int64
#: Compute capabilities that the ahead-of-time build makes cubins for.
ARCHITECTURES = ((8, 0), (9, 0), (10, 0), (12, 0))


def _with_arity(apply: Callable[..., Any], arity: int) -> Callable[..., Any]:
    """Numba reads the number of arguments from the signature."""
    if arity == 1:
        return lambda typing, a: apply(typing, a)
    if arity == 2:
        return lambda typing, a, b: apply(typing, a, b)
    if arity == 3:
        return lambda typing, a, b, c: apply(typing, a, b, c)
    if arity == 4:
        return lambda typing, a, b, c, d: apply(typing, a, b, c, d)
    return lambda typing, a, b, c, d, e: apply(typing, a, b, c, d, e)


if MISSING is None:
    if not hasattr(np, "row_stack"):
        np.row_stack = np.vstack  # noqa: NPY201
    from llvmlite import ir
    from numba import cuda, types
    from numba.core.extending import intrinsic, register_jitable
    from numba.cuda import dispatcher as _dispatcher

    sync = cuda.syncthreads
    _F4, _U2, _U4 = types.CPointer(types.float32), types.CPointer(types.uint16), types.CPointer(types.uint32)
    _EIGHT = types.UniTuple(types.float32, 8)
    _FLOAT, _HALF, _WORD = ir.FloatType(), ir.IntType(16), ir.IntType(32)

    def _index(k: int) -> ir.Constant:
        return ir.Constant(_WORD, k)

    def _address(builder: Any, pointer: Any, index: Any, vector: ir.Type) -> Any:
        return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

    def _widen(builder: Any, word: Any, high: bool) -> Any:
        """One of the two bfloat16 in a 32-bit word as float32: its bits with 16 zeros behind them."""
        bits = builder.and_(word, ir.Constant(_WORD, 0xFFFF0000)) if high else builder.shl(word, _index(16))
        return builder.bitcast(bits, _FLOAT)

    def _round_pair(builder: Any, low: Any, high: Any) -> Any:
        """Two float32 rounded to nearest into one word."""
        kind = ir.FunctionType(_WORD, [_FLOAT, _FLOAT])
        return builder.call(ir.InlineAsm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"), [high, low])

    @intrinsic
    def load8(typing, p, i):
        """Eight floats from index ``i`` on; the address is a multiple of 16 bytes."""
        if p not in (_F4, _U2):
            return None

        def generate(context, builder, signature, arguments):
            pointer, index = arguments
            found = []
            if p == _F4:
                for first in (0, 4):
                    at = builder.add(index, ir.Constant(index.type, first))
                    four = builder.load(_address(builder, pointer, at, ir.VectorType(_FLOAT, 4)))
                    four.align = 16
                    found += [builder.extract_element(four, _index(k)) for k in range(4)]
            else:
                words = builder.load(_address(builder, pointer, index, ir.VectorType(_WORD, 4)))
                words.align = 16
                for k in range(4):
                    word = builder.extract_element(words, _index(k))
                    found += [_widen(builder, word, False), _widen(builder, word, True)]
            return context.make_tuple(builder, _EIGHT, found)

        return _EIGHT(p, i), generate

    @intrinsic
    def store8(typing, p, i, t):
        """Store eight floats from index ``i`` on; the address is a multiple of 16 bytes."""
        if p not in (_F4, _U2):
            return None

        def generate(context, builder, signature, arguments):
            pointer, index, eight = arguments
            values = [builder.extract_value(eight, k) for k in range(8)]
            if p == _F4:
                for first in (0, 4):
                    four = ir.Constant(ir.VectorType(_FLOAT, 4), ir.Undefined)
                    for k in range(4):
                        four = builder.insert_element(four, values[first + k], _index(k))
                    at = builder.add(index, ir.Constant(index.type, first))
                    builder.store(four, _address(builder, pointer, at, four.type)).align = 16
            else:
                words = ir.Constant(ir.VectorType(_WORD, 4), ir.Undefined)
                for k in range(4):
                    pair = _round_pair(builder, values[2 * k], values[2 * k + 1])
                    words = builder.insert_element(words, pair, _index(k))
                builder.store(words, _address(builder, pointer, index, words.type)).align = 16
            return context.get_dummy_value()

        return types.void(p, i, t), generate

    @intrinsic
    def store4(typing, p, i, t):
        """Store four float32 from index ``i`` on; the address is a multiple of 16 bytes."""
        if p != _F4:
            return None

        def generate(context, builder, signature, arguments):
            pointer, index, values = arguments
            four = ir.Constant(ir.VectorType(_FLOAT, 4), ir.Undefined)
            for k in range(4):
                four = builder.insert_element(four, builder.extract_value(values, k), _index(k))
            builder.store(four, _address(builder, pointer, index, four.type)).align = 16
            return context.get_dummy_value()

        return types.void(p, i, t), generate

    @intrinsic
    def load(typing, p, i):
        """One float."""
        if p not in (_F4, _U2):
            return None

        def generate(context, builder, signature, arguments):
            value = builder.load(builder.gep(arguments[0], [arguments[1]]))
            if p == _U2:
                value = builder.bitcast(builder.shl(builder.zext(value, _WORD), _index(16)), _FLOAT)
            return value

        return types.float32(p, i), generate

    @intrinsic
    def store(typing, p, i, v):
        """Store one float32."""
        if p not in (_F4, _U2) or v != types.float32:
            return None

        def generate(context, builder, signature, arguments):
            pointer, index, value = arguments
            if p == _U2:
                word = _round_pair(builder, value, ir.Constant(_FLOAT, 0.0))
                value = builder.trunc(word, _HALF)
            builder.store(value, builder.gep(pointer, [index]))
            return context.get_dummy_value()

        return types.void(p, i, v), generate

    @intrinsic
    def float_of(typing, word):
        """A 32-bit word's bits as float32."""
        return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(
            arguments[0], _FLOAT
        )

    @intrinsic
    def opaque(typing, word):
        """A 32-bit word of which the compiler knows nothing: what is made from it is made where it stands, not once
        before a loop to wait in registers."""

        def generate(context, builder, signature, arguments):
            kind = ir.FunctionType(_WORD, [_WORD])
            return builder.call(ir.InlineAsm(kind, "mov.b32 $0, $1;", "=r,r", side_effect=True), arguments)

        return types.uint32(types.uint32), generate

    @intrinsic
    def wide_product(typing, a, b):
        """The 64-bit product of two 32-bit words as (high, low)."""
        pair = types.UniTuple(types.uint32, 2)

        def generate(context, builder, signature, arguments):
            long = ir.IntType(64)
            product = builder.mul(builder.zext(arguments[0], long), builder.zext(arguments[1], long))
            high = builder.trunc(builder.lshr(product, ir.Constant(long, 32)), _WORD)
            return context.make_tuple(builder, pair, [high, builder.trunc(product, _WORD)])

        return pair(types.uint32, types.uint32), generate

    @intrinsic
    def count_up(typing, p, i):
        """Add 1 to an integer in device memory for all to see; returns what it was.

        Integers alone: sums of floats in the order of arrival would differ from run to run.
        """

        def generate(context, builder, signature, arguments):
            at = builder.gep(arguments[0], [arguments[1]])
            return builder.atomic_rmw("add", at, _index(1), "monotonic")

        return types.uint32(_U4, i), generate

    _device = register_jitable(forceinline=True)

    @_device
    def warp_sum(v):
        """The sum over a warp, in every lane, by halves."""
        for half in (16, 8, 4, 2, 1):
            v += cuda.shfl_xor_sync(0xFFFFFFFF, v, half)
        return v

    @_device
    def warp_max(v):
        """The maximum over a warp, in every lane; a NaN loses."""
        for half in (16, 8, 4, 2, 1):
            v = max(v, cuda.shfl_xor_sync(0xFFFFFFFF, v, half))
        return v

    @_device
    def column():
        """This thread's place along the grid's x."""
        return cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x

    @_device
    def row():
        """Its place along y."""
        return cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y

    @_device
    def row_step():
        return cuda.gridDim.y * cuda.blockDim.y

    @_device
    def rows_of(run):
        """Rows of the batch."""
        return i4(run[ROWS])

    def point(function: Callable[..., Any]) -> Any:
        """A function that kernels call."""
        return _device(function)

    def each(function: Callable[..., Any], arity: int) -> Any:
        """A device function that calls a point function of so many arguments eight times.

        Tuples of eight give their element k, other arguments go as they are.
        """
        point = _device(function)

        def apply(typing, *given):
            several = [isinstance(kind, types.BaseTuple) and len(kind) == 8 for kind in given]
            kinds = tuple(kind.dtype if many else kind for kind, many in zip(given, several, strict=True))
            callee = typing.resolve_value_type(point)
            called = typing.resolve_function_type(callee, kinds, {})
            result = types.UniTuple(called.return_type, 8)

            def generate(context, builder, signature, arguments):
                inner = context.get_function(callee, called)
                found = []
                for k in range(8):
                    pairs = zip(arguments, several, strict=True)
                    found.append(inner(builder, [builder.extract_value(v, k) if many else v for v, many in pairs]))
                return context.make_tuple(builder, result, found)

            return result(*given), generate

        return intrinsic(_with_arity(apply, arity))

    # -------------------------------------------------------------------------------------- ends of rows
    _PLACES = tuple(range(8))

    def _load_one(k, p, i, n, other):
        return load(p, i + k) if k < n else other

    def _store_one(k, v, p, i, n):
        if k < n:
            store(p, i + k, v)
        return k

    _load_each, _store_each = each(_load_one, 5), each(_store_one, 5)

    @_device
    def load_some(p, i, n, other):
        """Eight floats from index ``i`` on, one by one; ``other`` from the n-th on. Any address will do."""
        return _load_each(_PLACES, p, i, n, other)

    @_device
    def store_some(p, i, t, n):
        """Store the first n of eight floats, one by one."""
        _store_each(_PLACES, t, p, i, n)

    @_device
    def take8(p, i, n, whole, other):
        """`load8` where a thread's eight columns are there, aligned and ``whole``, else `load_some`."""
        return load8(p, i) if whole else load_some(p, i, n, other)

    @_device
    def give8(p, i, t, n, whole):
        """As `take8`."""
        if whole:
            store8(p, i, t)
        else:
            store_some(p, i, t, n)

    # -------------------------------------------------------------------------------------- for sums
    def _add(a, b):
        return a + b

    add8 = each(_add, 2)

    @_device
    def place():
        """This thread's number within its block."""
        return i4(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x)

else:

    def point(function: Callable[..., Any]) -> Any:
        return function

    def each(function: Callable[..., Any], arity: int) -> Any:
        return function


# ---------------------------------------------------------------------------------------------------- compilation
def _signature(kernel: Kernel, dtype: str) -> Any:
    kinds = {"i4": types.int32, "u4": types.uint32, "f4": types.float32, "i8": types.int64, "f8": types.float64}
    kinds |= {f"{name}*": types.CPointer(kind) for name, kind in kinds.items()}
    kinds |= {"u1*": types.CPointer(types.uint8), "u2*": _U2}
    kinds["T*"] = _F4 if dtype == "float32" else _U2
    return types.void(*(kinds[kind] for kind, _ in kernel.arguments))


def ptx(kernel: Kernel, dtype: str = "float32", cc: tuple[int, int] = (9, 0)) -> str:
    """PTX of a kernel for pointers to ``dtype`` ("float32" or "bfloat16"); neither a GPU nor a driver is needed."""
    if MISSING:
        raise BackendUnavailable(f"CUDA kernels cannot be compiled: {MISSING}")
    # Device functions ask the current device for its compute capability when they are typed.
    before = _dispatcher.get_current_device
    _dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=cc)
    try:
        text, _ = cuda.compile(kernel.function, _signature(kernel, dtype), device=False, abi="numba", cc=cc)
    finally:
        _dispatcher.get_current_device = before
    return re.sub(r"(\.visible \.entry )(\S+)\(", rf"\1{kernel.name}(", text, count=1)


def cubin(kernel: Kernel, dtype: str = "float32", cc: tuple[int, int] = (9, 0)) -> tuple[bytes, str]:
    """Machine code of a kernel, and the assembler's report on registers, stack and spills.

    The kernel's budget of registers is imposed only where the assembler overdraws it: under a limit it spills some that
    it does not need without one.
    """
    text = ptx(kernel, dtype, cc).encode()
    code, report = _assembled(kernel.name, text, cc)
    if int(re.search(r"Used (\d+) registers", report)[1]) > kernel.registers:
        code, report = _assembled(kernel.name, text, cc, f"-maxrregcount={kernel.registers}")
    return code, report


def _assembled(name: str, text: bytes, cc: tuple[int, int], *options: str) -> tuple[bytes, str]:
    from cuda.bindings import nvjitlink

    options = (f"-arch=sm_{cc[0]}{cc[1]}", "-verbose", *options)
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text, len(text), name)
        nvjitlink.complete(handle)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return bytes(code), log.decode(errors="replace").rstrip("\0")
