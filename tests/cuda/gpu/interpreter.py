"""PTX executed on the CPU: one NumPy lane for each thread of a grid.

Lanes run in lock step, those with the lowest instruction first, so that they meet again behind a branch. All blocks
run at once, each on shared memory of its own. Rounding is IEEE's except for fused multiply-adds (rounded from float64:
twice in rare cases) and the approximate instructions, which are computed exactly here.

A `Trap` is what a GPU might not tell: an address outside of every allocation, an access that is not aligned, a barrier
that some threads of a block do not reach, a word of shared memory that two warps touch without a barrier in between
(one of them writing), an instruction that is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu.operations import OPERATIONS
from gpu.ptx import TYPES, Instruction, Module, Trap

BASE = 0x1000_0000  # of device memory; constants of a module lie below
GUARD = 256  # bytes between allocations that belong to none


class Memory:
    """Device memory: allocations with guards between them."""

    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 20, np.uint8)
        self.owned = np.zeros(self.bytes.size, bool)
        self.top = GUARD

    def allocate(self, size: int, offset: int = 0) -> int:
        """Address of fresh bytes, all ones (NaN as floats); ``offset`` beyond a multiple of 256."""
        start = self.top + offset
        while start + size + 2 * GUARD > self.bytes.size:
            self.bytes, self.owned = (np.concatenate([a, np.zeros_like(a)]) for a in (self.bytes, self.owned))
        self.bytes[start : start + size], self.owned[start : start + size] = 0xFF, True
        self.top = (start + size + 2 * GUARD - 1) // GUARD * GUARD
        return BASE + start

    def write(self, address: int, array: np.ndarray) -> None:
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.bytes[address - BASE : address - BASE + data.size] = data

    def read(self, address: int, dtype: Any, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        return np.frombuffer(self.bytes[address - BASE : address - BASE + size].tobytes(), dtype).copy()


class Grid:
    """All threads of a launch.

    Parameters
    ----------
    module : Module
    grid, block : (x, y)
    arguments : sequence of int or float
    memory : Memory
    """

    def __init__(
        self, module: Module, grid: tuple[int, int], block: tuple[int, int], arguments: Sequence[Any], memory: Memory
    ) -> None:
        self.module, self.memory = module, memory
        threads, blocks = block[0] * block[1], grid[0] * grid[1]
        self.lanes = lanes = threads * blocks
        lane = np.arange(lanes)
        within, self.block = lane % threads, lane // threads
        self.warp_first = self.block * threads + within // 32 * 32
        self.in_warp, self.threads = within % 32, threads
        self.special = {
            "%tid.x": within % block[0],
            "%tid.y": within // block[0],
            "%ctaid.x": self.block % grid[0],
            "%ctaid.y": self.block // grid[0],
            "%laneid": self.in_warp,
        }
        sizes = {"%ntid.x": block[0], "%ntid.y": block[1], "%nctaid.x": grid[0], "%nctaid.y": grid[1]}
        self.special |= {name: np.full(lanes, size) for name, size in sizes.items()}
        self.special |= {
            f"%{name}.z": np.full(lanes, size) for name, size in (("tid", 0), ("ctaid", 0), ("ntid", 1), ("nctaid", 1))
        }
        self.arguments = {
            name: np.full(lanes, value, TYPES[kind])
            for (kind, name), value in zip(module.parameters, arguments, strict=True)
        }
        self.shared = np.full(blocks * max(16, module.shared_size), 0xFF, np.uint8)
        self.shared_size = max(16, module.shared_size)
        self.constants = np.frombuffer(bytes(module.constant_bytes), np.uint8)
        # race detection in shared memory: the last writer and reader of each byte since the block's last barrier
        self.writer = np.full(self.shared.size, -1, np.int64)
        self.reader = np.full(self.shared.size, -1, np.int64)
        self.values: dict[str, np.ndarray] = {}
        self.steps = 0

    # ------------------------------------------------------------------ operands
    def get(self, operand: str, kind: str) -> np.ndarray:
        dtype = TYPES[kind]
        if operand.startswith("%"):
            if operand in self.special:
                return self.special[operand].astype(dtype)
            value = self.values.get(operand)
            if value is None:
                raise Trap(f"{operand} is read before it is written")
            if value.dtype == dtype:
                return value
            return value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(dtype)
        if operand[:2] in ("0f", "0d"):
            bits = np.dtype(np.uint32 if operand[1] == "f" else np.uint64)
            return np.full(self.lanes, int(operand[2:], 16), bits).view(TYPES["f32" if operand[1] == "f" else "f64"])
        for table in (self.module.shared, self.module.constants):
            if operand in table:
                return np.full(self.lanes, table[operand], dtype)
        if dtype.kind == "b":
            return np.full(self.lanes, bool(int(operand, 0)))
        bits = int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.full(self.lanes, bits, f"u{dtype.itemsize}").view(dtype)

    def put(self, register: str, value: np.ndarray, active: np.ndarray | None) -> None:
        if register == "_":
            return
        dtype = self.module.dtype_of(register)
        if value.dtype != dtype:
            value = (
                value.view(dtype) if value.itemsize == dtype.itemsize and value.dtype != bool else value.astype(dtype)
            )
        if active is not None:
            before = self.values.get(register)
            value = np.where(active, value, np.zeros(1, dtype) if before is None else before)
        self.values[register] = value

    # ------------------------------------------------------------------ control
    def run(self, limit: int = 5_000_000) -> None:
        code, pc, count = self.module.code, np.zeros(self.lanes, np.int64), len(self.module.code)
        with np.errstate(all="ignore"):
            while True:
                at = int(pc.min())
                if at >= count:
                    return
                self.steps += 1
                if self.steps > limit:
                    raise Trap("no end in sight")
                here = pc == at
                whole = bool(here.all())
                instruction = code[at]
                active = here
                if instruction.guard:
                    told = self.values[instruction.guard]
                    active = here & (~told if instruction.negated else told)
                op = instruction.parts[0]
                if op == "bra":
                    pc[here] = at + 1
                    pc[active] = self.module.labels[instruction.operands[0]]
                elif op in ("ret", "exit", "trap"):
                    if op == "trap" and active.any():
                        raise Trap("trap instruction")
                    pc[here] = at + 1
                    pc[active] = count
                elif op in ("bar", "barrier"):
                    self._barrier(here, pc, count)
                    pc[here] = at + 1
                else:
                    self._execute(instruction, None if whole and active is here else active)
                    pc[here] = at + 1

    def _barrier(self, here: np.ndarray, pc: np.ndarray, count: int) -> None:
        waiting = np.isin(self.block, np.unique(self.block[here]))
        if (waiting & ~here & (pc < count)).any():
            raise Trap("divergent barrier: some threads of a block do not reach it")
        for block in np.unique(self.block[here]):
            first = block * self.shared_size
            self.writer[first : first + self.shared_size] = -1
            self.reader[first : first + self.shared_size] = -1

    def _execute(self, instruction: Instruction, active: np.ndarray | None) -> None:
        op = instruction.parts[0]
        run = OPERATIONS.get(op)
        if run is None:
            raise Trap(f"unknown instruction: {instruction.text}")
        try:
            run(self, instruction, active)
        except Trap as trap:
            raise Trap(f"{trap} in {self.module.name}: {instruction.text}") from None

    # ------------------------------------------------------------------ memory
    def place(self, operand: str) -> np.ndarray:
        """Addresses of ``[register+offset]``."""
        base, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\w+))?\]", operand).groups()
        return self.get(base.strip(), "s64") + np.int64(int(offset or "0", 0))

    def space(
        self, parts: list[str], address: np.ndarray, size: int, active: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of a state space and the positions in them, checked."""
        used = address if active is None else address[active]
        if (used % size).any():
            raise Trap(f"misaligned access of {size} bytes at {int(used[(used % size) != 0][0]):#x}")
        if "shared" in parts:
            if ((used < 0) | (used + size > self.shared_size)).any():
                raise Trap("out of bounds of shared memory")
            return self.shared, address + self.block * self.shared_size
        if "const" in parts or (used.size and used.max() < BASE):
            if ((used < 0) | (used + size > self.constants.size)).any():
                raise Trap(f"out of bounds of the constants at {int(used.max()):#x}")
            return self.constants, address
        offset = used - BASE
        if ((offset < 0) | (offset + size > self.memory.bytes.size)).any():
            raise Trap(f"out of bounds: no device memory at {int(used.min()):#x}")
        if not (self.memory.owned[offset].all() and self.memory.owned[offset + size - 1].all()):
            bad = used[~(self.memory.owned[offset] & self.memory.owned[offset + size - 1])]
            raise Trap(f"out of bounds: {int(bad[0]):#x} belongs to no allocation")
        return self.memory.bytes, address - BASE

    def watch(self, position: np.ndarray, size: int, active: np.ndarray | None, writing: bool) -> None:
        """Two threads that touch a shared byte between two barriers, one of them writing, race; lanes of a warp do not
        (they run in step here, and a warp-synchronous kernel says ``syncwarp``)."""
        lane = np.flatnonzero(active) if active is not None else np.arange(self.lanes)
        for byte in range(0, size, 4):
            at = position[lane] + byte
            others = [self.writer] if not writing else [self.writer, self.reader]
            for seen in others:
                last = seen[at]
                foreign = (last >= 0) & (last != self.warp_first[lane])
                if foreign.any():
                    raise Trap("race in shared memory: no barrier between two warps' accesses")
            (self.writer if writing else self.reader)[at] = self.warp_first[lane]
