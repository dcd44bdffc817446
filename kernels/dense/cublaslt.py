"""Products by cuBLASLt: the few calls of its C interface that a `Product` needs, by ctypes.

The library is column-major. A row-major c (M, N) = a (M, K) b (K, N) is its D^T: m = N, n = M, A our b, B our a. What
runs along the rows of its D (bias, the bits of ReLU, the sums of BGRADA) runs along our columns, so nothing is turned.

The algorithm is the heuristic's first for the sizes, types, strides and alignments, the same in every run; nothing is
timed. Descriptors need no GPU; a handle does.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
import weakref
from typing import Any

from fastdl.kernels.common.gpu import Product, View

_NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
_FOLDERS = ("cu13/lib", "cublas/lib")  # of the package nvidia
#: enum values of cublasLt.h, cublas_api.h and library_types.h
FLOAT32, BFLOAT16 = 0, 14
COMPUTE_32F, COMPUTE_TF32 = 68, 77
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD, AUX_TYPE, BIAS_TYPE = 3, 4, 7, 8, 11, 12, 22, 26
LAYOUT_TYPE, LAYOUT_ROWS, LAYOUT_COLS, LAYOUT_LD = 0, 2, 3, 4
MAX_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)  # of A, B, C, D
CODES = {
    "DEFAULT": 1,
    "BIAS": 4,
    "RELU_BIAS": 2 | 4,
    "RELU_AUX_BIAS": 2 | 128 | 4,
    "GELU_AUX_BIAS": 32 | 128 | 4,
    "DRELU": 8 | 128,
    "DGELU": 64 | 128,
    "BGRADA": 256,
}
_WITH_VECTOR = ("BIAS", "RELU_BIAS", "RELU_AUX_BIAS", "GELU_AUX_BIAS", "BGRADA")
_BITS, _VALUES = ("RELU_AUX_BIAS", "DRELU"), ("GELU_AUX_BIAS", "DGELU")
_P, _Z = ctypes.c_void_p, ctypes.c_size_t
_PROTOTYPES = {
    "Create": (_P,),
    "Destroy": (_P,),
    "MatmulDescCreate": (_P, ctypes.c_int, ctypes.c_int),
    "MatmulDescDestroy": (_P,),
    "MatmulDescSetAttribute": (_P, ctypes.c_int, _P, _Z),
    "MatmulDescGetAttribute": (_P, ctypes.c_int, _P, _Z, _P),
    "MatrixLayoutCreate": (_P, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "MatrixLayoutDestroy": (_P,),
    "MatrixLayoutGetAttribute": (_P, ctypes.c_int, _P, _Z, _P),
    "MatmulPreferenceCreate": (_P,),
    "MatmulPreferenceDestroy": (_P,),
    "MatmulPreferenceSetAttribute": (_P, ctypes.c_int, _P, _Z),
    "MatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, ctypes.c_int, _P, _P),
    "Matmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _Z, _P),
}


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", _Z),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


# ---------------------------------------------------------------------------------------------- the library
def switch(name: str, default: bool) -> bool:
    """An environment variable that is 0 or 1; an empty one is as good as none."""
    text = os.environ.get(name) or str(int(default))
    if text not in ("0", "1"):
        raise ValueError(f"{name}: expected 0 or 1, found {text[:40]!r}; set one of them or unset it")
    return text == "1"


def missing() -> str | None:
    """Why the library is not used, or None."""
    if not switch("FASTDL_CUBLASLT", True):
        return "switched off by FASTDL_CUBLASLT=0"
    return None if _found() else "libcublasLt was not found; run `pip install 'fastdl-kernels[cublas]'`"


@functools.cache
def _found() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    paths = [root / folder / name for root in roots for folder in _FOLDERS for name in _NAMES]
    for path in [*(str(p) for p in paths if p.exists()), *_NAMES]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, every function that is used with its types."""
    found = _found()
    if found is None:
        raise RuntimeError(missing())
    for name, types in _PROTOTYPES.items():
        function = getattr(found, f"cublasLt{name}")
        function.argtypes, function.restype = types, ctypes.c_int
    found.cublasLtGetStatusName.argtypes, found.cublasLtGetStatusName.restype = (ctypes.c_int,), ctypes.c_char_p
    return found


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), f"cublasLt{name}")(*arguments)
    if status:
        raise RuntimeError(f"cublasLt{name}: {library().cublasLtGetStatusName(status).decode()}")


# ---------------------------------------------------------------------------------------------- descriptors
def _type(view: View) -> int:
    return BFLOAT16 if view.dtype == "bfloat16" else FLOAT32


def check(product: Product) -> None:
    """Refuse what the library would read past, or what no epilogue is meant by.

    Raises
    ------
    ValueError
        With what was expected and what came.
    """
    a, b, c, kind = product.a, product.b, product.c, product.epilogue
    if kind not in CODES:
        raise ValueError(f"epilogue: expected one of {', '.join(CODES)}, found {kind!r}")
    m, n, k = product.sizes
    shapes = {"a": ((k, m) if product.a_turned else (m, k), a), "b": ((n, k) if product.b_turned else (k, n), b)}
    for name, (expected, view) in shapes.items():
        if view.shape != expected or view.row_stride < view.cols:
            raise ValueError(
                f"{name}: expected shape {expected} in rows, found {view.shape} with {view.row_stride} between rows"
            )
    if min(m, n, k) < 1:
        raise ValueError(f"product: expected at least one row, column and term, found {m} x {n} x {k}")
    if _type(a) != _type(b) or _type(c) not in (_type(a), FLOAT32):
        raise ValueError(
            f"types: expected a and b alike and c like them or float32, found {a.dtype}, {b.dtype}, {c.dtype}"
        )
    if (product.vector is not None) != (kind in _WITH_VECTOR):
        raise ValueError(f"{kind}: a vector was {'' if product.vector is not None else 'not '}given")
    if product.vector is not None and product.vector.shape != (n,):
        raise ValueError(f"vector: expected shape ({n},), found {product.vector.shape}")
    aux = product.aux
    if (aux is not None) != (kind in _BITS + _VALUES):
        raise ValueError(f"{kind}: aux was {'' if aux is not None else 'not '}given")
    if kind in _BITS and (aux.rows != m or aux.row_stride % 4 or 32 * aux.cols < n):
        raise ValueError(
            f"aux: expected {m} rows of at least {n} bits, a multiple of 4 words apart, found {aux.shape} words, "
            f"{aux.row_stride} apart"
        )
    if kind in _VALUES and (aux.shape != (m, n) or aux.row_stride % 8):
        raise ValueError(
            f"aux: expected ({m}, {n}) with a multiple of 8 between rows, found {aux.shape} with {aux.row_stride}"
        )


class Described:
    """The descriptors of one product; no GPU is needed."""

    def __init__(self, product: Product, tf32: bool = False, workspace: int = 0) -> None:
        check(product)
        compute = COMPUTE_TF32 if tf32 and _type(product.a) == FLOAT32 else COMPUTE_32F
        self.operation = self._new("MatmulDesc", compute, FLOAT32)
        self._set(TRANSA, product.b_turned, ctypes.c_int32)
        self._set(TRANSB, product.a_turned, ctypes.c_int32)
        self._set(EPILOGUE, CODES[product.epilogue], ctypes.c_uint32)
        if product.vector is not None:
            self._set(BIAS_POINTER, product.vector.address, ctypes.c_uint64)
            self._set(BIAS_TYPE, _type(product.vector), ctypes.c_int32)
        if product.aux is not None:
            self._set(AUX_POINTER, product.aux.address, ctypes.c_uint64)
            bits = product.epilogue in _BITS
            self._set(AUX_LD, product.aux.row_stride * (32 if bits else 1), ctypes.c_int64)
            if not bits:
                self._set(AUX_TYPE, _type(product.aux), ctypes.c_int32)
        self.a, self.b, self.c = (
            self._new("MatrixLayout", _type(v), v.cols, v.rows, v.row_stride) for v in (product.b, product.a, product.c)
        )
        self.preference = self._new("MatmulPreference")
        self._prefer(MAX_WORKSPACE, workspace, ctypes.c_uint64)
        for attribute, view in zip(ALIGNMENTS, (product.b, product.a, product.c, product.c), strict=True):
            self._prefer(attribute, alignment(view), ctypes.c_uint32)

    def _new(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        _call(f"{kind}Create", ctypes.byref(made), *arguments)
        weakref.finalize(self, getattr(library(), f"cublasLt{kind}Destroy"), made)
        return made

    def _set(self, attribute: int, value: int, kind: Any) -> None:
        value = kind(value)
        _call("MatmulDescSetAttribute", self.operation, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def _prefer(self, attribute: int, value: int, kind: Any) -> None:
        value = kind(value)
        _call("MatmulPreferenceSetAttribute", self.preference, attribute, ctypes.byref(value), ctypes.sizeof(value))


def alignment(view: View) -> int:
    """Bytes that an address is a multiple of, at most 256."""
    return min(256, view.address & -view.address) if view.address else 256


# ---------------------------------------------------------------------------------------------- on a GPU
class Library:
    """A handle, scratch memory on the GPU, and the algorithms that were chosen so far.

    Parameters
    ----------
    workspace, size : int
        Address and bytes of scratch memory.
    tf32 : bool
        Operands of float32 products may be rounded to 11 bits.
    """

    def __init__(self, workspace: int, size: int, tf32: bool = False) -> None:
        self._workspace, self._size, self._tf32 = workspace, size, tf32
        self._handle = ctypes.c_void_p()
        _call("Create", ctypes.byref(self._handle))
        weakref.finalize(self, library().cublasLtDestroy, self._handle)
        self._chosen: dict[Any, Any] = {}
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)

    def has(self, product: Product) -> bool:
        """Whether the heuristic has an algorithm."""
        return self._algorithm(product, None) is not None

    def _algorithm(self, product: Product, described: Described | None) -> Any:
        views = (product.a, product.b, product.c, product.vector, product.aux)
        seen = [v and (v.shape, v.row_stride, str(v.dtype), alignment(v)) for v in views]
        key = (*seen, product.a_turned, product.b_turned, product.epilogue)
        if key not in self._chosen:
            d = described or Described(product, self._tf32, self._size)
            result, count = Heuristic(), ctypes.c_int()
            what = self._handle, d.operation, d.a, d.b, d.c, d.c, d.preference
            into = 1, ctypes.byref(result), ctypes.byref(count)
            status = library().cublasLtMatmulAlgoGetHeuristic(*what, *into)
            self._chosen[key] = result if status == 0 and count.value and result.state == 0 else None
        return self._chosen[key]

    def enqueue(self, product: Product, stream: int) -> None:
        """Run it on a stream, behind what is there."""
        d = Described(product, self._tf32, self._size)
        found = self._algorithm(product, d)
        if found is None:
            raise RuntimeError(f"cuBLASLt has no algorithm for {product}; ask has() first")
        a, b, c = product.b.address, product.a.address, product.c.address
        one, zero, algorithm = (ctypes.byref(v) for v in (self._one, self._zero, found.algorithm))
        _call(
            "Matmul", self._handle, d.operation, one, a, d.a, b, d.b, zero, c, d.c, c, d.c, algorithm, self._workspace,
            self._size, stream,
        )  # fmt: skip
