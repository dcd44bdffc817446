"""The interpreter of PTX: what it computes is known from elsewhere, and every trap springs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import Launch, kernel

if gpu.MISSING:
    pytest.skip(gpu.MISSING, allow_module_level=True)

from gpu.device import Interpreted
from gpu.interpreter import Grid, Memory
from gpu.ptx import Module, Trap
from numba import cuda

from fastdl.kernels.random.numba_cuda import lanes8, philox4x32

#: Random123, tests/kat_vectors: philox4x32, 10 rounds (counter and key words | expected).
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@kernel("u4* out, u4 c0, u4 c1, u4 c2, u4 c3, u4 k0, u4 k1")
def known_answer(out, c0, c1, c2, c3, k0, k1):
    words = philox4x32(c0, c1, c2, c3, k0, k1)
    lanes = lanes8(words)
    for k in range(4):
        out[k] = words[k]
    for k in range(8):
        out[4 + k] = lanes[k]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    device = Interpreted()
    out = device.put(np.zeros(12, np.uint32))
    device.launch(Launch(known_answer, (1, 1), (1, 1), (out, *counter, *key)))
    found = device.get(out)
    words = np.array([int(word, 16) for word in expected.split()], np.uint32)
    np.testing.assert_array_equal(found[:4], words)
    np.testing.assert_array_equal(found[4:], words.view(np.uint16))


@kernel("f4* x, f4* y, i4 n, i4 extra")
def doubled(x, y, n, extra):
    i = gpu.column()
    if i < n + extra:
        y[i] = x[i] + x[i]


@kernel("f4* x, f4* y")
def by_eights(x, y):
    gpu.store8(y, gpu.i8(8) * gpu.column(), gpu.load8(x, gpu.i8(8) * gpu.column()))


@kernel("f4* y, i4 meet")
def shifted(y, meet):
    """Every thread reads what its neighbour in another warp has written."""
    room, i = cuda.shared.array(64, gpu.f4), cuda.threadIdx.x
    room[i] = gpu.f4(i)
    if meet == 1:
        cuda.syncthreads()
    y[i] = room[(i + 32) % 64]


@kernel("f4* y")
def half_of_them_meet(y):
    i = cuda.threadIdx.x
    if i < 10:
        cuda.syncthreads()
        y[i] = gpu.f4(1)
    else:
        y[i] = gpu.f4(2)


@kernel("u4* counter, u4* order, f4* sums")
def counted(counter, order, sums):
    i = gpu.column()
    sums[i] = gpu.warp_sum(gpu.f4(i)) + gpu.warp_max(gpu.f4(-i))
    order[i] = gpu.count_up(counter, gpu.i8(0))


def run(declared: Any, threads: int, *arguments: Any, device: Interpreted, blocks: int = 1) -> None:
    device.launch(Launch(declared, (blocks, 1), (threads, 1), arguments))


def test_threads_of_several_blocks() -> None:
    device, x = Interpreted(), np.arange(100, dtype=np.float32)
    view, out = device.put(x), device.put(np.zeros(100, np.float32))
    run(doubled, 32, view, out, 100, 0, device=device, blocks=4)
    np.testing.assert_array_equal(device.get(out), 2 * x)


def test_an_index_past_the_end_traps() -> None:
    device = Interpreted()
    view, out = (device.put(np.zeros(100, np.float32)) for _ in range(2))
    with pytest.raises(Trap, match="belongs to no allocation"):
        run(doubled, 128, view, out, 100, 1, device=device)


def test_a_misaligned_access_of_16_bytes_traps() -> None:
    device = Interpreted()
    view, out = device.put(np.zeros(64, np.float32), offset=4), device.put(np.zeros(64, np.float32))
    with pytest.raises(Trap, match="misaligned access of 16 bytes"):
        run(by_eights, 8, view, out, device=device)


def test_a_missing_barrier_traps() -> None:
    device = Interpreted()
    out = device.put(np.zeros(64, np.float32))
    run(shifted, 64, out, 1, device=device)
    np.testing.assert_array_equal(device.get(out), (np.arange(64) + 32) % 64)
    with pytest.raises(Trap, match="race in shared memory"):
        run(shifted, 64, out, 0, device=device)


def test_a_barrier_in_a_branch_traps() -> None:
    device = Interpreted()
    with pytest.raises(Trap, match="divergent barrier"):
        run(half_of_them_meet, 32, device.put(np.zeros(32, np.float32)), device=device)


def test_warps_and_counters() -> None:
    device = Interpreted()
    counter, order = device.put(np.zeros(1, np.uint32)), device.put(np.zeros(64, np.uint32))
    sums = device.put(np.zeros(64, np.float32))
    run(counted, 32, counter, order, sums, device=device, blocks=2)
    assert device.get(counter)[0] == 64
    np.testing.assert_array_equal(np.sort(device.get(order)), np.arange(64))
    np.testing.assert_array_equal(device.get(sums), np.repeat([496.0, 496.0 + 32 * 32 - 32], 32))


def test_what_it_does_not_know_it_does_not_guess() -> None:
    text = """.visible .entry odd(\n.param .u64 odd_param_0\n)\n{\n.reg .b32 %r<3>;\nbfind.u32 %r1, %r2;\nret;\n}"""
    with pytest.raises(Trap, match=r"unknown instruction: bfind.u32"):
        Grid(Module(text), (1, 1), (1, 1), [0], Memory()).run()
    with pytest.raises(Trap, match="read before it is written"):
        Grid(Module(text.replace("bfind.u32 %r1, %r2", "add.u32 %r1, %r2, 1")), (1, 1), (1, 1), [0], Memory()).run()
    with pytest.raises(Trap, match="local memory"):
        Module(text.replace("ret;", "ld.local.u32 %r1, [%r2];\nret;"))
