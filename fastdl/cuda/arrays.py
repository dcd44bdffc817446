"""Arrays in GPU memory, other libraries' and fastdl's: they come in and leave without a copy.

CuPy, PyTorch, Numba and JAX share device memory by two protocols: DLPack (``dlpack.py``), which knows bfloat16 and in
which the producer puts its stream before the consumer's, and ``__cuda_array_interface__``, where the consumer waits for
the stream that is named. Both promise an order of streams only, so nobody waits on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from fastdl.cuda import dlpack
from fastdl.cuda.mirror import Pool, on_host
from fastdl.kernels.common import driver
from fastdl.kernels.common.gpu import View

#: DLDeviceType -> what it is called where it is not what was asked for
_PLACES = {dlpack.CPU: "host memory", dlpack.CUDA_HOST: "pinned host memory"}
_ON_GPU = (dlpack.CUDA, dlpack.CUDA_MANAGED)
#: dtype -> PyTorch's method
_METHODS = {"float32": "float()", "float64": "double()", "bfloat16": "bfloat16()", "int64": "long()", "int32": "int()"}


class DeviceArray:
    """An array in GPU memory, as CuPy, PyTorch, Numba and JAX take it.

    Parameters
    ----------
    address : int
        Of the first element.
    shape : sequence of int
    dtype : NumPy's dtype or "bfloat16"
    row_stride : int, optional
        Elements from row to row; without gaps if not given. A vector has none.
    owner : object
        Kept as long as this array: whoever frees the memory when it goes.
    stream : int, optional
        The stream on which the values are made; None when nobody has to wait for them.
    device : int
        The GPU's number.
    """

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: Any,
        row_stride: int | None = None,
        owner: Any = None,
        stream: int | None = None,
        device: int = 0,
    ) -> None:
        self.address, self.shape = int(address), tuple(int(size) for size in shape)
        self.dtype: np.dtype | str = "bfloat16" if _name(dtype) == "bfloat16" else np.dtype(dtype)
        self.row_stride = math.prod(self.shape[1:]) if row_stride is None else int(row_stride)
        self.owner, self.stream, self.device = owner, stream, device

    # ------------------------------------------------------------------ what it is
    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return _itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Of the elements, without gaps between rows."""
        return self.size * self.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        plain = dlpack.compact(self.shape)
        return plain if self.ndim < 2 else (self.row_stride, *plain[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, address={self.address:#x})"

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Some rows, one behind the other; the same memory."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows: expected a step of 1, found {step}; copy them with your library")
        address = self.address + start * self.strides[0] * self.itemsize
        return self._over(address, (max(0, stop - start), *self.shape[1:]), self.row_stride)

    def reshaped(self, *shape: int) -> DeviceArray:
        """The same elements in another shape; none may be left out, and rows have no gaps."""
        if math.prod(shape) != self.size or self.strides != dlpack.compact(self.shape):
            raise ValueError(f"expected {self.size} elements without gaps, found shape {shape}")
        return self._over(self.address, shape, None)

    def _over(self, address: int, shape: Sequence[int], row_stride: int | None) -> DeviceArray:
        return DeviceArray(address, shape, self.dtype, row_stride, self, self.stream, self.device)

    def like(self, shape: Sequence[int]) -> DeviceArray:
        """A new array of this type, of zeros."""
        device = driver.current()
        pool = Pool(None, device)
        address = pool.allocate(math.prod(shape) * self.itemsize)
        return DeviceArray(address, shape, self.dtype, None, pool, _stream_of(device), self.device)

    def holding(self, values: np.ndarray) -> DeviceArray:
        """A new array with these values of the host."""
        found = self.like(values.shape)
        driver.current().write(found.address, np.ascontiguousarray(values, self.dtype))
        return found

    def view(self, name: str = "") -> View:
        """What launches take. It does not keep the memory: whoever launches keeps the array until the work is done."""
        return View(self.address, self.shape, self.row_stride, self.dtype, name)

    # ------------------------------------------------------------------ to the host
    def numpy(self) -> np.ndarray:
        """A copy on the host; bfloat16 comes as float32."""
        device = driver.current()
        _wait(device, self.stream)
        return on_host(device, self.view())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        raise TypeError("the array is in GPU memory, and NumPy's functions would copy it silently; call .numpy()")

    # ------------------------------------------------------------------ to other libraries
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == "bfloat16":
            raise AttributeError(
                "__cuda_array_interface__ names types as NumPy does, and NumPy has no bfloat16; DLPack has it"
            )
        compact = self.strides == dlpack.compact(self.shape)
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.size else 0, False),
            "strides": None if compact else tuple(step * self.itemsize for step in self.strides),
            "stream": self.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for one consumer, who may work on his stream at once: it waits for ours.

        As DLPack has it for CUDA, no stream means the legacy default stream (1), and -1 that nobody has to wait. The
        capsule is unversioned whatever ``max_version``, which every consumer has to take.
        """
        if copy:
            raise BufferError(f"expected copy=None or False, found {copy}: no copy is made here; copy what you get")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(
                f"expected dl_device {self.__dlpack_device__()}, found {tuple(dl_device)}: no copy is made here"
            )
        after = 1 if stream is None else stream
        if after == 0 or after < -1:
            raise ValueError(
                f"stream: expected -1, 1, 2 or a stream's address, found {stream}; "
                "the default stream is 1 (legacy) or 2 (per thread)"
            )
        if self.stream is not None and after not in (-1, self.stream):
            driver.current().order(before=self.stream, after=after)
        return dlpack.given(
            self.address, self.shape, self.strides, self.dtype, owner=self, device=self.__dlpack_device__()
        )


def on_device(value: Any) -> bool:
    """Whether an array lies in GPU memory. Arrays that cannot be shared, like sharded ones, do not count."""
    if isinstance(value, (np.ndarray, list)):
        return False
    if isinstance(value, DeviceArray):
        return True
    device = _dlpack_device(value)
    return (device is not None and device[0] in _ON_GPU) or _interface(value) is not None


def adopt(value: Any, name: str, dtypes: Sequence[Any], ndim: int | None = None) -> DeviceArray:
    """An array in GPU memory as ours, without a copy, or an error that says why not.

    Our stream waits for what still computes it. The result keeps the memory; work that reads it has to be done before
    the result goes, because the producer's next array may lie there.

    Parameters
    ----------
    value : object
        With DLPack or ``__cuda_array_interface__``, DLPack first.
    name : str
        What errors call it.
    dtypes : sequence of dtype
        Those that are taken; the first is the one advised.
    ndim : int, optional
        Dimensions it must have, at least one otherwise.
    """
    device = driver.current()
    stream = _stream_of(device)
    place = _dlpack_device(value)
    if isinstance(value, DeviceArray):
        _check_device(name, value.device, device)
        _check(name, value, dtypes, ndim)
        _wait(device, value.stream)
        return value
    if place is not None and place[0] in _ON_GPU:
        _check_device(name, place[1], device)
        found = _by_dlpack(value, name, {} if stream is None else {"stream": stream})
        row_stride = _check(name, found, dtypes, ndim)
        owner: Any = found
    elif (interface := _interface(value)) is not None:
        found = _by_interface(interface, name, _ordinal(device))
        row_stride = _check(name, found, dtypes, ndim)
        if (made_on := interface.get("stream")) == 0:
            raise ValueError(
                f"{name}: expected a stream or None in __cuda_array_interface__, found 0; 1 is the default"
            )
        _wait(device, made_on)
        owner = value
    else:
        raise TypeError(
            f"{name}: expected an array in GPU memory, found {_described(value, place)}; "
            f"move it there with {name}.cuda() or cupy.asarray({name})"
        )
    return DeviceArray(found.address, found.shape, found.dtype, row_stride, owner, stream, _ordinal(device))


# ---------------------------------------------------------------------------------------------- the protocols
def _dlpack_device(value: Any) -> tuple[int, int] | None:
    try:
        kind, number = value.__dlpack_device__()
    except Exception:  # whatever another library raises where it does not fit: several devices, no memory
        return None
    return int(kind), int(number)


def _interface(value: Any) -> dict[str, Any] | None:
    try:
        return value.__cuda_array_interface__
    except Exception:
        return None


def _by_dlpack(value: Any, name: str, streams: dict[str, int]) -> dlpack.Tensor:
    try:
        return dlpack.taken(value.__dlpack__(**streams))
    except BufferError as error:
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{name}: expected an array, found a tensor that requires gradients; pass {name}.detach()"
            ) from error
        raise BufferError(f"{name}: cannot be shared: {error}") from error
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def _by_interface(interface: dict[str, Any], name: str, ordinal: int) -> dlpack.Tensor:
    """The interface as DLPack says it. It does not name the GPU: ours is assumed. Byte order shows in the dtype."""
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: expected an array without a mask, found a masked one; fill it first")
    shape, dtype, strides = tuple(interface["shape"]), np.dtype(interface["typestr"]), interface.get("strides")
    if strides is None:
        steps = dlpack.compact(shape)
    elif any(step % dtype.itemsize for step in strides):
        raise _laid_out(name, shape, f"{tuple(strides)} bytes")
    else:
        steps = tuple(step // dtype.itemsize for step in strides)
    return dlpack.Tensor(interface["data"][0], shape, steps, str(dtype), (dlpack.CUDA, ordinal))


def _wait(device: Any, stream: int | None) -> None:
    """Let the device's stream wait for what lies on another."""
    ours = getattr(device, "stream", None)
    if stream is not None and ours is not None and int(ours) != stream:
        device.order(before=stream, after=int(ours))


# ---------------------------------------------------------------------------------------------- checks
def _check(name: str, found: dlpack.Tensor | DeviceArray, dtypes: Sequence[Any], ndim: int | None) -> int:
    """The row stride of an array that can be taken as it is."""
    dtype, expected, shape = str(found.dtype), [_name(one) for one in dtypes], found.shape
    if dtype not in expected:
        advised = expected[0]
        raise TypeError(
            f"{name}: expected {' or '.join(expected)}, found {dtype}; "
            f"convert with {name}.{_METHODS.get(advised, f'to(torch.{advised})')} or {name}.astype('{advised}')"
        )
    if len(shape) != ndim if ndim is not None else not shape:
        wanted = "at least one dimension" if ndim is None else "one dimension" if ndim == 1 else f"{ndim} dimensions"
        raise ValueError(f"{name}: expected {wanted}, found shape {shape}; reshape it")
    if not math.prod(shape):
        raise ValueError(f"{name}: expected at least one element, found shape {shape}")
    row_stride = _row_stride(shape, found.strides)
    if row_stride is None:
        raise _laid_out(name, shape, str(found.strides))
    if found.address % _itemsize(dtype):
        raise ValueError(
            f"{name}: expected an address that is a multiple of {_itemsize(dtype)}, found {found.address:#x}; "
            f"copy it with {name}.clone() or {name}.copy()"
        )
    return row_stride


def _check_device(name: str, number: int, device: Any) -> None:
    if number != _ordinal(device):
        raise ValueError(
            f"{name}: expected an array on GPU {_ordinal(device)}, found one on GPU {number}; "
            f"move it with {name}.to('cuda:{_ordinal(device)}')"
        )


def _row_stride(shape: tuple[int, ...], strides: Sequence[int]) -> int | None:
    """Elements between rows; None unless rows are contiguous and lie one behind the other.

    Only rows of a matrix may have gaps between them. The stride of a dimension of size 1 means nothing.
    """
    plain = dlpack.compact(shape)
    if any(size > 1 and step != want for size, step, want in zip(shape[1:], strides[1:], plain[1:], strict=True)):
        return None
    if shape[0] == 1 or strides[0] == plain[0]:
        return plain[0]
    return strides[0] if len(shape) == 2 and strides[0] > plain[0] else None


def _laid_out(name: str, shape: tuple[int, ...], strides: str) -> ValueError:
    return ValueError(
        f"{name}: expected contiguous rows one behind the other, found shape {shape}, "
        f"which is laid out with strides {strides}; call {name}.contiguous() or ascontiguousarray({name})"
    )


def _described(value: Any, place: tuple[int, int] | None) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if place is None:
        return f"{kind}, which is not there"
    return f"{kind} in {_PLACES.get(place[0], f'memory of DLPack device type {place[0]}')}"


def _stream_of(device: Any) -> int | None:
    stream = getattr(device, "stream", None)
    return None if stream is None else int(stream)


def _ordinal(device: Any) -> int:
    return getattr(device, "ordinal", 0)


def _name(dtype: Any) -> str:
    return "bfloat16" if dtype == "bfloat16" else str(np.dtype(dtype))


def _itemsize(dtype: Any) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
