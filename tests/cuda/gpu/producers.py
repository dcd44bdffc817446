"""Producers of arrays in GPU memory as other libraries have them, and a device that only remembers."""

from __future__ import annotations

from typing import Any

from fastdl.cuda import dlpack
from gpu.device import Interpreted

STREAM = 0x5000  # ours


class Remembering(Interpreted):
    """Memory, and the orders of streams that were asked for."""

    stream = STREAM

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[tuple[int, int]] = []

    def order(self, before: int, after: int) -> None:
        self.orders.append((before, after))


class Owner:
    """Something whose end can be seen."""


def struct_of(capsule: Any) -> dlpack._Struct:
    return dlpack._Struct.from_address(dlpack._pointer(capsule, b"dltensor"))


class Giving:
    """A producer in the terms of DLPack."""

    def __init__(self, capsule: Any, device: tuple[int, int] = (dlpack.CPU, 0)) -> None:
        self.capsule, self.device, self.asked = capsule, device, {}

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = asked
        return self.capsule


class Interface:
    """An array in the terms of ``__cuda_array_interface__``."""

    def __init__(
        self, address: int = 0x7000, shape: tuple[int, ...] = (4, 6), typestr: str = "<f4", **more: Any
    ) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            **more,
        }


def shared(
    shape: tuple[int, ...] = (4, 6),
    strides: tuple[int, ...] | None = None,
    dtype: str = "float32",
    address: int = 0x7000,
    place: tuple[int, int] = (dlpack.CUDA, 0),
    owner: Any = None,
) -> Giving:
    return Giving(dlpack.given(address, shape, strides, dtype, owner=owner, device=place), place)
