"""Arrays of other libraries in GPU memory: what is adopted and refused, and what leaves, on a device that only
remembers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu.producers import STREAM, Giving, Interface, Owner, Remembering, shared, struct_of

from fastdl.cuda import dlpack
from fastdl.cuda.arrays import DeviceArray, adopt, on_device
from fastdl.kernels.common import driver
from fastdl.kernels.common.gpu import View

BASE = np.arange(24.0).reshape(4, 6)


@pytest.fixture
def device() -> Iterator[Remembering]:
    fake = Remembering()
    before = driver.use(fake)
    yield fake
    driver.use(before)


# ---------------------------------------------------------------------------------------------- arrays adopted
def both(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> list[Any]:
    """A float32 array by each protocol."""
    steps = None if strides is None else tuple(4 * step for step in strides)
    return [shared(shape, strides), Interface(shape=shape, strides=steps)]


@pytest.mark.parametrize(
    ("shape", "strides", "row_stride"),
    [
        ((4, 6), None, 6),
        ((4, 6), (6, 1), 6),
        ((4, 6), (8, 1), 8),  # columns of a wider matrix
        ((4, 1), (8, 3), 8),  # one column of it
        ((1, 6), (0, 1), 6),
        ((1, 1), (-5, 7), 1),
        ((4,), (1,), 1),
        ((1,), (9,), 1),
        ((2, 3, 4), (12, 4, 1), 12),
    ],
)
def test_layouts_that_are_taken(shape, strides, row_stride, device) -> None:
    for value in both(shape, strides):
        array = adopt(value, "X", ["float32"])
        assert (array.address, array.shape, array.row_stride) == (0x7000, shape, row_stride)
        assert array.dtype == np.float32
        assert array.view("x") == View(0x7000, shape, row_stride, np.dtype(np.float32), "x")


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((4, 6), (1, 4)),  # transposed
        ((4, 6), (12, 2)),
        ((4, 6), (5, 1)),  # rows overlap
        ((4, 6), (0, 1)),  # one row, repeated
        ((4, 6), (-6, 1)),
        ((4, 6), (6, -1)),
        ((4,), (2,)),
        ((4,), (0,)),
        ((2, 3, 4), (16, 4, 1)),
        ((2, 3, 4), (12, 5, 1)),
    ],
)
def test_layouts_that_are_refused(shape, strides, device) -> None:
    for value in both(shape, strides):
        with pytest.raises(
            ValueError, match=r"X: expected contiguous rows .* strides \(.*\); call X\.contiguous\(\) or asc"
        ):
            adopt(value, "X", ["float32"])


def test_strides_between_elements_are_refused(device) -> None:
    with pytest.raises(ValueError, match=r"laid out with strides \(26, 4\) bytes; call X\.contiguous\(\)"):
        adopt(Interface(strides=(26, 4)), "X", ["float32"])


def test_dlpack_comes_first_and_tells_the_producer_our_stream(device) -> None:
    value = shared(dtype="bfloat16")
    value.__cuda_array_interface__ = Interface(0x9000).__cuda_array_interface__
    array = adopt(value, "X", [np.float32, "bfloat16"], ndim=2)
    assert (array.address, array.dtype, array.stream) == (0x7000, "bfloat16", STREAM)
    assert value.asked == {"stream": STREAM}
    assert device.orders == []


def test_managed_memory_is_gpu_memory(device) -> None:
    assert adopt(shared(place=(dlpack.CUDA_MANAGED, 0)), "X", ["float32"]).address == 0x7000


def test_a_device_without_streams_names_none(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Remembering, "stream")
    value = shared()
    assert adopt(value, "X", ["float32"]).stream is None
    assert value.asked == {}
    assert adopt(Interface(stream=77), "X", ["float32"]).stream is None
    assert device.orders == []


@pytest.mark.parametrize(
    ("told", "orders"),
    [({}, []), ({"stream": None}, []), ({"stream": STREAM}, [])]
    + [({"stream": stream}, [(stream, STREAM)]) for stream in (1, 2, 77)],
)
def test_our_stream_waits_for_that_of_the_interface(told, orders, device) -> None:
    assert adopt(Interface(**told), "X", ["float32"]).stream == STREAM
    assert device.orders == orders


def test_what_is_adopted_lives_as_long_as_the_array(device) -> None:
    owner = Owner()
    ended = weakref.ref(owner)
    array = adopt(shared(owner=owner), "X", ["float32"])
    del owner
    assert ended() is not None
    del array
    assert ended() is None
    value = Interface()
    ended = weakref.ref(value)
    array = adopt(value, "X", ["float32"])
    del value
    assert ended() is not None
    del array
    assert ended() is None


def test_what_is_refused_is_released(device) -> None:
    owner = Owner()
    ended = weakref.ref(owner)
    with pytest.raises(TypeError):
        adopt(shared(owner=owner), "X", ["float64"])
    del owner
    gc.collect()  # the traceback holds the frames
    assert ended() is None


def test_our_own_arrays_pass_as_they_are(device) -> None:
    array = DeviceArray(0x7000, (4, 6), "bfloat16", row_stride=8, stream=STREAM)
    assert adopt(array, "X", ["bfloat16"], ndim=2) is array
    assert device.orders == []
    other = DeviceArray(0x7000, (4,), np.float32, stream=77)
    assert adopt(other, "X", ["float32"]) is other
    assert device.orders == [(77, STREAM)]


@pytest.mark.parametrize("make", [shared, Interface, lambda: DeviceArray(0x7000, (4, 6), np.float32)])
def test_types_are_refused_with_the_conversion(make, device) -> None:
    for dtypes, message in (
        (["float64"], r"X: expected float64, found float32; convert with X\.double\(\) or X\.astype\('float64'\)"),
        ([np.int64, "int32"], r"X: expected int64 or int32, found float32; convert with X\.long\(\)"),
        (["bfloat16"], r"X: expected bfloat16, found float32; convert with X\.bfloat16\(\)"),
        ([np.uint8], r"X: expected uint8, found float32; convert with X\.to\(torch\.uint8\) or X\.astype\('uint8'\)"),
    ):
        with pytest.raises(TypeError, match=message):
            adopt(make(), "X", dtypes)


def test_types_of_few_are_refused(device) -> None:
    for typestr, found in ((">f4", r">f4"), ("<c8", "complex64"), ("|V2", r"\|V2")):
        with pytest.raises(TypeError, match=rf"X: expected float32, found {found}; convert"):
            adopt(Interface(typestr=typestr), "X", ["float32"])
    value = shared()
    struct_of(value.capsule).lanes = 4
    with pytest.raises(TypeError, match=r"X: expected one of DLPack's types .* 4 lanes"):
        adopt(value, "X", ["float32"])


@pytest.mark.parametrize("make", [shared, Interface, lambda shape: DeviceArray(0x7000, shape, np.float32)])
def test_shapes_are_refused(make, device) -> None:
    for shape, ndim, message in (
        ((4, 6), 1, r"X: expected one dimension, found shape \(4, 6\); reshape it"),
        ((4,), 2, r"X: expected 2 dimensions, found shape \(4,\); reshape it"),
        ((), None, r"X: expected at least one dimension, found shape \(\); reshape it"),
        ((0, 6), 2, r"X: expected at least one element, found shape \(0, 6\)"),
        ((4, 0), None, r"X: expected at least one element, found shape \(4, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt(make(shape=shape), "X", ["float32"], ndim)


def test_addresses_between_items_are_refused(device) -> None:
    for value in (shared(address=0x7002), Interface(0x7002), DeviceArray(0x7002, (4,), "float32")):
        with pytest.raises(ValueError, match=r"X: expected an address that is a multiple of 4, found 0x7002; copy it"):
            adopt(value, "X", ["float32"])
    assert adopt(shared(address=0x7002, dtype="bfloat16"), "X", ["bfloat16"]).address == 0x7002


def test_arrays_of_another_gpu_are_refused(device, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (shared(place=(dlpack.CUDA, 1)), DeviceArray(0x7000, (4,), "float32", device=1)):
        with pytest.raises(
            ValueError, match=r"X: expected an array on GPU 0, found one on GPU 1; move it with X\.to\('cuda:0'"
        ):
            adopt(value, "X", ["float32"])
    assert value.device == 1
    monkeypatch.setattr(Remembering, "ordinal", 1, raising=False)
    array = adopt(shared(place=(dlpack.CUDA, 1)), "X", ["float32"])
    assert array.__dlpack_device__() == (dlpack.CUDA, 1)


def test_arrays_that_are_elsewhere_are_refused(device) -> None:
    for value, found in (
        (BASE, "numpy.ndarray in host memory"),
        ([1.0], "list, which is not there"),
        (None, "NoneType, which is not there"),
        (shared(place=(dlpack.CUDA_HOST, 0)), r"gpu\.producers\.Giving in pinned host memory"),
        (shared(place=(10, 0)), r"gpu\.producers\.Giving in memory of DLPack device type 10"),
    ):
        with pytest.raises(
            TypeError, match=rf"X: expected an array in GPU memory, found .*{found}; move it there with X\."
        ):
            adopt(value, "X", ["float32"])


def test_an_interface_with_a_mask_or_an_unclear_stream_is_refused(device) -> None:
    with pytest.raises(TypeError, match="X: expected an array without a mask, found a masked one; fill it first"):
        adopt(Interface(mask=Interface(typestr="|b1")), "X", ["float32"])
    with pytest.raises(ValueError, match="X: expected a stream or None in __cuda_array_interface__, found 0"):
        adopt(Interface(stream=0), "X", ["float32"])
    assert device.orders == []


def test_producers_that_refuse_are_named(device) -> None:
    class Refusing(Giving):
        def __dlpack__(self, **asked: Any) -> Any:
            raise BufferError("no export today")

    value = Refusing(None, (dlpack.CUDA, 0))
    with pytest.raises(BufferError, match="X: cannot be shared: no export today"):
        adopt(value, "X", ["float32"])
    value.requires_grad = True
    with pytest.raises(
        TypeError, match=r"X: expected an array, found a tensor that requires gradients; pass X\.detach\(\)"
    ):
        adopt(value, "X", ["float32"])


def test_a_tensor_of_torch_that_requires_gradients(device) -> None:
    torch = pytest.importorskip("torch")

    class OnGPU(torch.Tensor):
        def __dlpack_device__(self) -> tuple[int, int]:
            return dlpack.CUDA, 0

    value = torch.ones(3).as_subclass(OnGPU).requires_grad_()
    with pytest.raises(TypeError, match=r"requires gradients; pass X\.detach\(\)"):
        adopt(value, "X", ["float32"])


def test_where_arrays_lie() -> None:
    class Sharded:
        def __dlpack_device__(self) -> tuple[int, int]:
            raise BufferError("sharded")

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise ValueError("sharded")

    class Incomplete:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise TypeError("no such type")

    on_gpu = [
        DeviceArray(0x7000, (4,), "bfloat16"),
        Interface(),
        shared(),
        shared(place=(dlpack.CUDA_MANAGED, 0)),
        shared(place=(dlpack.CUDA, 3)),
    ]
    assert all(on_device(value) for value in on_gpu)
    elsewhere = [
        BASE, np.float32(1), [1.0], (1.0,), 1.0, None, "text", np.ndarray, range(3), memoryview(b"x"), Sharded(),
        Incomplete(), Giving(None), shared(place=(dlpack.CUDA_HOST, 0)), shared(place=(10, 0)),
    ]  # fmt: skip
    assert not any(on_device(value) for value in elsewhere)


def test_tensors_of_torch_on_the_cpu_are_not_on_the_gpu() -> None:
    torch = pytest.importorskip("torch")
    for value in (torch.ones(3), torch.ones(3, requires_grad=True), torch.ones(3, device="meta")):
        assert not on_device(value)


# ---------------------------------------------------------------------------------------------- arrays that leave
def test_what_an_array_is() -> None:
    array = DeviceArray(0x7000, (4, 6), np.float32, row_stride=8)
    assert (len(array), array.ndim, array.size, array.itemsize, array.nbytes) == (4, 2, 24, 4, 96)
    assert array.strides == (8, 1)
    assert repr(array) == "DeviceArray(shape=(4, 6), dtype=float32, address=0x7000)"
    half = DeviceArray(address=0x7000, shape=[3], dtype="bfloat16")
    assert (len(half), half.ndim, half.row_stride, half.itemsize, half.nbytes) == (3, 1, 1, 2, 6)
    assert half.view() == View(0x7000, (3,), 1, "bfloat16")
    assert DeviceArray(0x7000, (3,), np.float32, row_stride=3).strides == (1,)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", "bfloat16"])
@pytest.mark.parametrize("gap", [0, 2])
def test_a_copy_on_the_host(dtype: str, gap: int, device) -> None:
    source = (BASE % 3).astype(np.float32 if dtype == "bfloat16" else dtype)
    view = device.put(source, dtype, gap)
    array = DeviceArray(view.address, view.shape, dtype, row_stride=view.row_stride, stream=STREAM)
    found = array.numpy()
    assert found.dtype == source.dtype
    np.testing.assert_array_equal(found, source)
    assert device.orders == []


def test_a_copy_waits_for_the_stream_that_made_it(device) -> None:
    view = device.put(BASE[0])
    found = DeviceArray(view.address, view.shape, view.dtype, stream=77).numpy()
    np.testing.assert_array_equal(found, BASE[0])
    assert device.orders == [(77, STREAM)]


def test_no_silent_copy_to_the_host() -> None:
    array = DeviceArray(0x7000, (4, 6), np.float32)
    for use in (np.asarray, np.sum, lambda a: a + np.ones(6), lambda a: np.ones(6) @ a):
        with pytest.raises(TypeError):
            use(array)
    with pytest.raises(TypeError, match=r"in GPU memory.*call \.numpy\(\)"):
        np.asarray(array)


def test_the_interface_of_an_array() -> None:
    array = DeviceArray(0x7000, (4, 6), np.float32, stream=STREAM)
    assert array.__cuda_array_interface__ == {
        "version": 3,
        "shape": (4, 6),
        "typestr": "<f4",
        "data": (0x7000, False),
        "strides": None,
        "stream": STREAM,
    }
    assert DeviceArray(0x7000, (4, 6), "int64", row_stride=8).__cuda_array_interface__["strides"] == (64, 8)
    assert DeviceArray(0x7000, (4,), "bool").__cuda_array_interface__["stream"] is None
    assert DeviceArray(0x7000, (0, 4), "bool").__cuda_array_interface__["data"] == (0, False)


def test_bfloat16_has_no_interface_but_dlpack() -> None:
    array = DeviceArray(0x7000, (4, 6), "bfloat16", row_stride=8)
    assert not hasattr(array, "__cuda_array_interface__")
    with pytest.raises(AttributeError, match="NumPy has no bfloat16; DLPack has it"):
        _ = array.__cuda_array_interface__
    tensor = dlpack.taken(array.__dlpack__())
    assert (tensor.dtype, tensor.shape, tensor.strides) == ("bfloat16", (4, 6), (8, 1))


def test_an_array_leaves_by_dlpack_and_lives_on(device) -> None:
    owner = Owner()
    ended = weakref.ref(owner)
    array = DeviceArray(0x7000, (4, 6), np.float32, owner=owner)
    assert array.__dlpack_device__() == (2, 0)
    tensor = dlpack.taken(array.__dlpack__(stream=1, max_version=(1, 0), dl_device=(2, 0), copy=False))
    assert (tensor.address, tensor.shape, tensor.dtype, tensor.device) == (0x7000, (4, 6), "float32", (2, 0))
    del owner, array
    assert ended() is not None
    del tensor
    assert ended() is None
    assert device.orders == []  # made on no stream


@pytest.mark.parametrize(
    ("stream", "orders"),
    [(None, [(STREAM, 1)]), (1, [(STREAM, 1)]), (2, [(STREAM, 2)]), (77, [(STREAM, 77)]), (-1, []), (STREAM, [])],
)
def test_the_consumer_stream_waits_for_ours(stream, orders, device) -> None:
    DeviceArray(0x7000, (4, 6), np.float32, stream=STREAM).__dlpack__(stream=stream)
    assert device.orders == orders


def test_what_dlpack_is_not_given(device) -> None:
    array = DeviceArray(0x7000, (4, 6), np.float32, stream=STREAM)
    with pytest.raises(BufferError, match=r"expected copy=None or False, found True"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"expected dl_device \(2, 0\), found \(1, 0\)"):
        array.__dlpack__(dl_device=(1, 0))
    for stream in (0, -2):
        with pytest.raises(
            ValueError, match=rf"stream: expected -1, 1, 2 or a stream's address, found {stream}; .*1 \(legacy\)"
        ):
            array.__dlpack__(stream=stream)
    assert device.orders == []


def test_an_array_comes_back_as_it_left(device) -> None:
    array = DeviceArray(0x7000, (4, 6), np.float32, row_stride=8, stream=STREAM)
    for way in (Giving(array.__dlpack__(), (2, 0)), Interface(strides=(32, 4), stream=STREAM)):
        back = adopt(way, "X", ["float32"], ndim=2)
        assert (back.address, back.shape, back.strides) == (array.address, array.shape, array.strides)
