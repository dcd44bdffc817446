"""A model's arenas in device memory, and memory that goes when its owner goes."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from fastdl.kernels.common.gpu import View
from fastdl.kernels.optimizers.numba_cuda import round_launch

LINE = 64  # bytes: what arenas of the host are aligned to
SLACK = 256  # and those of the device


def on_host(device: Any, view: View) -> np.ndarray:
    """A copy on the host; bfloat16 comes as float32."""
    rows, cols = (view.rows, view.cols) if len(view.shape) == 2 else (1, int(np.prod(view.shape)))
    stride = view.row_stride if rows > 1 else cols
    kind = np.dtype(np.uint16) if view.dtype == "bfloat16" else np.dtype(view.dtype)
    flat = device.read(view.address, kind, (rows - 1) * stride + cols if rows else 0)
    found = np.lib.stride_tricks.as_strided(flat, (rows, cols), (stride * kind.itemsize, kind.itemsize))
    if view.dtype == "bfloat16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(found).reshape(view.shape)


class Pool:
    """Device memory that is given back when its owner goes, or the pool itself where it has none."""

    def __init__(self, owner: Any, device: Any) -> None:
        self._device, self._taken = device, []
        weakref.finalize(self if owner is None else owner, _give_back, device, self._taken)

    def allocate(self, size: int) -> int:
        """Address of zeros."""
        self._taken.append(self._device.allocate(size))
        return self._taken[-1]


def _give_back(device: Any, addresses: list[int]) -> None:
    for address in addresses:
        device.free(address)


class Mirror:
    """The arenas of a model in device memory, copied to and fro as a whole.

    Arenas of which products read a bfloat16 copy have one beside the float32 values: the optimiser's sweep keeps it up
    to date, a launch of its own after the host has written.
    """

    def __init__(self, device: Any, version: np.ndarray) -> None:
        self.device, self.version, self._pool = device, version, Pool(self, device)
        self._arenas: dict[int, tuple[np.ndarray, int]] = {}  # address of the host's bytes -> (bytes, device address)
        self._rounded: dict[int, int] = {}  # address of the host's bytes -> device address of the copy
        self._seen = -1  # version of the host's values that the device has
        self.newer = False  # the device has written since the last pull

    def address(self, array: np.ndarray) -> int:
        """Where an array inside an arena lies in device memory."""
        root = _root(array)
        host = root.ctypes.data
        if host not in self._arenas:
            self._arenas[host] = root, self._pool.allocate(root.nbytes + SLACK) + SLACK - _lead(host)
            self.device.write(self._arenas[host][1], root)
        return self._arenas[host][1] + array.ctypes.data - host

    def rounded_address(self, array: np.ndarray) -> int:
        """Where the bfloat16 copy of a float32 array inside an arena lies."""
        root = _root(array)
        host = root.ctypes.data
        if host not in self._rounded:
            self.address(root)
            self._rounded[host] = self._pool.allocate(root.nbytes // 2)
            self._round(host)
        return self._rounded[host] + (array.ctypes.data - host - _lead(host)) // 2

    def _round(self, host: int) -> None:
        """Make an arena's copy anew."""
        root, address = self._arenas[host]
        shape = ((root.nbytes - LINE) // 4,)
        master = View(address + _lead(host), shape, 1, np.dtype(np.float32), "parameters")
        self.device.run([round_launch(master, View(self._rounded[host], shape, 1, "bfloat16", "rounded"))])

    def push(self) -> None:
        """Copy the host's values down if they have changed."""
        if self._seen != self.version[0]:
            for root, address in self._arenas.values():
                self.device.write(address, root)
            for host in self._rounded:
                self._round(host)
            self._seen = int(self.version[0])

    def wrote(self) -> None:
        """The device has changed parameters or states."""
        self.version += 1
        self._seen, self.newer = int(self.version[0]), True

    def pull(self) -> None:
        """Copy the device's values up if they are newer."""
        if self.newer:
            for root, address in self._arenas.values():
                root[...] = self.device.read(address, root.dtype, root.size)
            self.newer = False


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _lead(host: int) -> int:
    """Bytes before the first element: arenas start at a cache line (`fastdl.run.arena.aligned`)."""
    return -host % LINE
