"""Products of cuBLASLt: descriptors by the real library where it is present, what they mean by its documentation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from gpu.interpreter import Memory
from gpu.products import carry_out

from fastdl.kernels.common import driver
from fastdl.kernels.common.gpu import EPILOGUES, Product, View
from fastdl.kernels.dense import cublaslt

F4 = np.dtype(np.float32)
needs_library = pytest.mark.skipif(cublaslt.missing() is not None, reason=str(cublaslt.missing()))
#: Types of the operands and of the result.
TYPES = [(F4, F4), ("bfloat16", "bfloat16"), ("bfloat16", F4)]
TURNED = [(False, False), (False, True), (True, False)]


def bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


class Case:
    """A product on arrays with gaps between their rows, in an interpreter's memory."""

    def __init__(self, epilogue: str, types: tuple, turned: tuple[bool, bool], sizes: tuple[int, int, int]) -> None:
        m, n, k = sizes
        self.memory, self.rng, self.sizes = Memory(), np.random.default_rng(3), sizes
        self.a = self.rng.standard_normal((m, k)).astype(np.float32)
        self.b = self.rng.standard_normal((k, n)).astype(np.float32)
        inputs, output = types
        words = -(-n // 128) * 4
        vector = aux = None
        if epilogue.endswith("BIAS"):
            vector = self.put(self.rng.standard_normal(n).astype(np.float32), output)
        elif epilogue == "BGRADA":
            vector = self.put(np.zeros(n, np.float32), output)
        if epilogue in ("RELU_AUX_BIAS", "DRELU"):
            aux = self.put(self.rng.integers(0, 1 << 32, (m, words), np.uint32), np.dtype(np.uint32), 4)
        elif epilogue in ("GELU_AUX_BIAS", "DGELU"):
            aux = self.put(self.rng.standard_normal((m, n)).astype(np.float32), output, 8 + -n % 8)
        left = self.put(self.a.T if turned[0] else self.a, inputs, 3)
        right = self.put(self.b.T if turned[1] else self.b, inputs, 5)
        out = self.put(np.zeros((m, n), np.float32), output, 2)
        self.product = Product(left, right, out, *turned, epilogue, vector, aux)

    def put(self, array: np.ndarray, dtype: object, gap: int = 0) -> View:
        rows, cols = (1, array.size) if array.ndim == 1 else array.shape
        kind = np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)
        laid = np.full((rows, cols + gap), 77, kind)
        laid[:, :cols] = bfloat16(array) if dtype == "bfloat16" else array
        address = self.memory.allocate(laid.nbytes)
        self.memory.write(address, laid)
        return View(address, array.shape, cols + gap, dtype)

    def get(self, view: View) -> np.ndarray:
        """The values; what lies between the rows has to be there still."""
        kind = np.dtype(np.uint16) if view.dtype == "bfloat16" else view.dtype
        rows = view.rows if len(view.shape) == 2 else 1
        laid = self.memory.read(view.address, kind, rows * view.row_stride).reshape(rows, view.row_stride)
        cols = view.shape[-1]
        assert (laid[:, cols:] == 77).all()
        found = laid[:, :cols].reshape(view.shape)
        return widened(found) if view.dtype == "bfloat16" else found


def direct(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """The product as rows have it, and what the vector holds afterwards."""
    product, kind = case.product, case.product.epilogue
    turned = [case.get(product.a), case.get(product.b)]
    a, b = (x.T if t else x for x, t in zip(turned, (product.a_turned, product.b_turned), strict=True))
    z = a.astype(np.float64) @ b.astype(np.float64)
    vector = None if product.vector is None else case.get(product.vector)
    if kind.endswith("BIAS"):
        z = z + vector
    if kind.startswith("RELU"):
        return np.maximum(z, 0), vector
    if kind == "GELU_AUX_BIAS":
        return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))), vector
    if kind == "DRELU":
        words = case.get(product.aux)
        columns = np.arange(z.shape[1])
        return z * ((words[:, columns // 32] >> (columns % 32).astype(np.uint32)) & 1), None
    if kind == "DGELU":
        x = case.get(product.aux).astype(np.float64)
        h = 1e-6
        gelu = lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))  # noqa: E731
        return z * (gelu(x + h) - gelu(x - h)) / (2 * h), None
    return z, b.astype(np.float64).sum(0) if kind == "BGRADA" else vector


# ---------------------------------------------------------------------------------------------- what products mean
@pytest.mark.parametrize("turned", TURNED, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}")
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_products_as_documented(epilogue: str, types: tuple, turned: tuple[bool, bool]) -> None:
    case = Case(epilogue, types, turned, (7, 37, 11))
    want, vector = direct(case)
    carry_out(case.product, case.memory)
    tolerance = 2e-2 if types[1] == "bfloat16" else 1e-4
    np.testing.assert_allclose(case.get(case.product.c), want, rtol=tolerance, atol=tolerance)
    if vector is not None:
        np.testing.assert_allclose(case.get(case.product.vector), vector, rtol=tolerance, atol=tolerance)


def test_the_bits_of_relu_undo_it() -> None:
    forward = Case("RELU_AUX_BIAS", (F4, F4), (False, False), (6, 130, 9))
    carry_out(forward.product, forward.memory)
    y = forward.get(forward.product.c)
    back = replace(forward.product, epilogue="DRELU", vector=None)
    plain = replace(back, epilogue="DEFAULT", aux=None)
    found = []
    for product in (plain, back):
        carry_out(product, forward.memory)
        found.append(forward.get(product.c).copy())
    np.testing.assert_array_equal(found[1], found[0] * (y > 0))


# ---------------------------------------------------------------------------------------------- descriptors
def attribute(get: Callable[..., int], handle: ctypes.c_void_p, number: int, kind: type) -> int:
    value, written = kind(), ctypes.c_size_t()
    assert get(handle, number, ctypes.byref(value), ctypes.sizeof(value), ctypes.byref(written)) == 0
    return value.value


@needs_library
@pytest.mark.parametrize("turned", TURNED, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}")
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_descriptors(epilogue: str, types: tuple, turned: tuple[bool, bool]) -> None:
    """The library takes them and gives back what was asked for."""
    product = Case(epilogue, types, turned, (7, 37, 11)).product
    described, lib = cublaslt.Described(product, workspace=1 << 20), cublaslt.library()

    def of_operation(number: int, kind: type) -> int:
        return attribute(lib.cublasLtMatmulDescGetAttribute, described.operation, number, kind)

    assert of_operation(cublaslt.EPILOGUE, ctypes.c_uint32) == cublaslt.CODES[epilogue]
    assert of_operation(cublaslt.TRANSA, ctypes.c_int32) == turned[1]
    assert of_operation(cublaslt.TRANSB, ctypes.c_int32) == turned[0]
    if product.vector is not None:
        assert of_operation(cublaslt.BIAS_POINTER, ctypes.c_uint64) == product.vector.address
    if product.aux is not None:
        bits = product.aux.dtype == np.uint32
        assert of_operation(cublaslt.AUX_POINTER, ctypes.c_uint64) == product.aux.address
        assert of_operation(cublaslt.AUX_LD, ctypes.c_int64) == product.aux.row_stride * (32 if bits else 1)
    for handle, view in ((described.a, product.b), (described.b, product.a), (described.c, product.c)):
        found = [
            attribute(lib.cublasLtMatrixLayoutGetAttribute, handle, number, kind)
            for number, kind in (
                (cublaslt.LAYOUT_TYPE, ctypes.c_uint32),
                (cublaslt.LAYOUT_ROWS, ctypes.c_uint64),
                (cublaslt.LAYOUT_COLS, ctypes.c_uint64),
                (cublaslt.LAYOUT_LD, ctypes.c_int64),
            )
        ]
        kind = cublaslt.BFLOAT16 if view.dtype == "bfloat16" else cublaslt.FLOAT32
        assert found == [kind, view.cols, view.rows, view.row_stride]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epilogue": "SINE"}, "epilogue: expected one of DEFAULT"),
        ({"b_turned": True}, r"b: expected shape \(37, 11\)"),
        ({"vector": None}, "RELU_AUX_BIAS: a vector was not given"),
        ({"epilogue": "DRELU"}, "DRELU: a vector was given"),
        ({"aux": None}, "RELU_AUX_BIAS: aux was not given"),
        ({"vector": View(256, (36,), 1, F4)}, r"vector: expected shape \(37,\), found \(36,\)"),
        ({"aux": View(256, (7, 4), 5, np.dtype(np.uint32))}, "multiple of 4 words apart"),
        ({"aux": View(256, (7, 1), 4, np.dtype(np.uint32))}, "at least 37 bits"),
        ({"a": View(256, (7, 11), 11, "bfloat16")}, "types: expected a and b alike"),
        ({"epilogue": "GELU_AUX_BIAS", "aux": View(256, (7, 37), 37, F4)}, "multiple of 8 between rows"),
        ({"a": View(256, (0, 11), 11, F4), "c": View(256, (0, 37), 37, F4)}, "at least one row"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, match: str) -> None:
    product = Case("RELU_AUX_BIAS", (F4, F4), (False, False), (7, 37, 11)).product
    cublaslt.check(product)
    with pytest.raises(ValueError, match=match):
        cublaslt.check(replace(product, **change))


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDL_CUBLASLT", "0")
    assert cublaslt.missing() == "switched off by FASTDL_CUBLASLT=0"


@needs_library
def test_without_a_gpu_a_handle_says_why() -> None:
    if driver.missing() is None:
        pytest.skip("a GPU is here")
    with pytest.raises(RuntimeError, match="cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED"):
        cublaslt.Library(256, 1 << 20)


# ---------------------------------------------------------------------------------------------- on a GPU
@needs_library
@pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))
@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}")
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_library_does_what_is_documented(epilogue: str, types: tuple) -> None:
    gpu = driver.current()
    case = Case(epilogue, types, (False, False), (64, 128, 96))
    there = {}

    def moved(view: View | None) -> View | None:
        if view is None:
            return None
        kind = np.dtype(np.uint16) if view.dtype == "bfloat16" else view.dtype
        rows = view.rows if len(view.shape) == 2 else 1
        laid = case.memory.read(view.address, kind, rows * view.row_stride)
        there[view.address] = gpu.allocate(laid.nbytes)
        gpu.write(there[view.address], laid)
        return replace(view, address=there[view.address])

    product = case.product
    names = ("a", "b", "c", "vector", "aux")
    on_gpu = replace(product, **{name: moved(getattr(product, name)) for name in names})
    if not gpu.library.has(on_gpu):
        pytest.skip(f"the library has no {epilogue} for these types")
    gpu.run([on_gpu])
    carry_out(product, case.memory)
    for name in ("c", "vector", "aux"):
        view = getattr(product, name)
        if view is None:
            continue
        kind = np.dtype(np.uint16) if view.dtype == "bfloat16" else view.dtype
        rows = view.rows if len(view.shape) == 2 else 1
        found = gpu.read(there[view.address], kind, rows * view.row_stride)
        want = case.memory.read(view.address, kind, rows * view.row_stride)
        if kind == np.uint32:
            np.testing.assert_array_equal(found, want)
        elif view.dtype == "bfloat16":
            np.testing.assert_allclose(widened(found), widened(want), rtol=2e-2, atol=2e-2)
        else:
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
