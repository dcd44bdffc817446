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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BASE = 0x1000_0000  # of device memory; constants of a module lie below
GUARD = 256  # bytes between allocations that belong to none

TYPES = {
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}


class Trap(RuntimeError):
    """What the program did wrong."""


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


@dataclass
class Instruction:
    guard: str
    negated: bool
    parts: list[str]
    operands: list[str]
    text: str
    run: Callable[..., None] | None = field(default=None)

    @property
    def kind(self) -> str:
        """The type suffix: the last part that names one."""
        return next((p for p in reversed(self.parts) if p in TYPES), "b32")


class Module:
    """A kernel's PTX, parsed."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        self.shared, self.shared_size = {}, 0
        for align, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\S+?)\[(\d+)\]", text):
            start = -(-self.shared_size // int(align)) * int(align)
            self.shared[name], self.shared_size = start, start + int(size)
        self.constants: dict[str, int] = {}
        self.constant_bytes = bytearray(64)
        for width, name, values in re.findall(
            r"\.(?:const|global)\s+\.align\s+\d+\s+\.[bu](\d+)\s+(\S+?)\[\d+\]\s*=\s*\{([^}]*)\}", text
        ):
            self.constant_bytes += bytes(-len(self.constant_bytes) % 16)
            self.constants[name] = len(self.constant_bytes)
            for value in values.split(","):
                self.constant_bytes += (int(value, 0) & ((1 << int(width)) - 1)).to_bytes(int(width) // 8, "little")
        head, _, body = text[text.index(".entry") :].partition("{")
        self.name = re.match(r"\.entry\s+(\S+?)\s*\(", head)[1]
        self.parameters = re.findall(r"\.param\s+\.(\w+)\s+(?:\.ptr[^,)]*?\s)?(\S+?)\s*[,)\n]", head)
        self.registers: dict[str, np.dtype] = {}
        for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<", body):
            self.registers[prefix] = TYPES[kind]
        if ".local" in body:
            raise Trap("the kernel uses local memory: registers were spilled to the stack")
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in re.split(r";|(?<=:)\s", body[: body.rindex("}")]):
            line = " ".join(line.split())
            if re.fullmatch(r"\$?\w+:", line):
                self.labels[line[:-1]] = len(self.code)
            elif line and not line.startswith((".", "{", "}")):
                self.code.append(_parse(line))

    def dtype_of(self, register: str) -> np.dtype:
        return self.registers[re.match(r"%[a-z]+", register)[0]]


def _parse(line: str) -> Instruction:
    guard, negated, text = "", False, line
    if line.startswith("@"):
        guard, line = line.split(" ", 1)
        negated, guard = guard.startswith("@!"), guard.lstrip("@!")
    name, _, rest = line.partition(" ")
    operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
    return Instruction(guard, negated, name.split("."), operands, text)


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


def _registers(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _load(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    dtype = TYPES[i.kind]
    if "param" in i.parts:
        value = g.arguments[re.match(r"\[([^+\]]+)", i.operands[1])[1]]
        g.put(i.operands[0], value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(dtype), active)
        return
    targets = _registers(i.operands[0])
    size = dtype.itemsize * len(targets)
    source, position = g.space(i.parts, g.place(i.operands[1]), size, active)
    if "shared" in i.parts:
        g.watch(position, size, active, False)
    index = (position if active is None else np.where(active, position, 0)) // dtype.itemsize
    values = source[: source.size // dtype.itemsize * dtype.itemsize].view(dtype)
    for k, register in enumerate(targets):
        g.put(register, values[index + k], active)


def _store(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    dtype = TYPES[i.kind]
    sources = _registers(i.operands[1])
    size = dtype.itemsize * len(sources)
    target, position = g.space(i.parts, g.place(i.operands[0]), size, active)
    if "shared" in i.parts:
        g.watch(position, size, active, True)
    index = position // dtype.itemsize
    values = target[: target.size // dtype.itemsize * dtype.itemsize].view(dtype)
    for k, register in enumerate(sources):
        value = g.get(register, i.kind)
        if active is None:
            values[index + k] = value
        else:
            values[(index + k)[active]] = value[active]


def _mov(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    to, source = i.operands
    if source.startswith("{"):  # pack
        parts = [g.get(r, f"u{8 * TYPES[i.kind].itemsize // len(_registers(source))}") for r in _registers(source)]
        g.put(to, np.stack(parts, axis=1).copy().view(TYPES[i.kind])[:, 0], active)
    elif to.startswith("{"):  # unpack
        registers = _registers(to)
        parts = g.get(source, i.kind).copy().view(f"u{TYPES[i.kind].itemsize // len(registers)}").reshape(g.lanes, -1)
        for k, register in enumerate(registers):
            g.put(register, parts[:, k].copy(), active)
    else:
        g.put(to, g.get(source, i.kind), active)


def _bfloat16(value: np.ndarray) -> np.ndarray:
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint32)


def _cvt(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    if "bf16x2" in i.parts:
        high, low = (_bfloat16(g.get(operand, "f32")) for operand in i.operands[1:3])
        g.put(i.operands[0], (high << np.uint32(16)) | low, active)
        return
    to, source = [p for p in i.parts if p in TYPES][:2]
    value = g.get(i.operands[1], source)
    dtype = TYPES[to]
    if value.dtype.kind == "f":
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        value = next((f(value) for p, f in rounding.items() if p in i.parts), value)
        if dtype.kind in "iu":  # saturates, NaN gives 0
            limits = np.iinfo(dtype)
            value = np.nan_to_num(np.clip(value.astype(np.float64), float(limits.min), float(limits.max)))
    g.put(i.operands[0], value.astype(dtype), active)


def _setp(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    a, b = g.get(i.operands[1], i.kind), g.get(i.operands[2], i.kind)
    name = i.parts[1]
    compare = {
        "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
        "ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if name in ("num", "nan"):
        found = (np.isnan(a) | np.isnan(b)) == (name == "nan")
    elif a.dtype.kind == "f":
        unordered = np.isnan(a) | np.isnan(b)
        found = compare[name.removesuffix("u")](a, b)
        found = found | unordered if name.endswith("u") else found & ~unordered
    else:
        found = compare[name](a, b)
    joined = next((p for p in i.parts[2:] if p in ("and", "or", "xor")), None)
    if joined:
        found = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined](
            found, g.get(i.operands[3], "pred")
        )
    first, _, second = i.operands[0].partition("|")
    g.put(first, found, active)
    if second:
        g.put(second, ~found, active)


def _selp(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    g.put(
        i.operands[0],
        np.where(g.get(i.operands[3], "pred"), g.get(i.operands[1], i.kind), g.get(i.operands[2], i.kind)),
        active,
    )


def _multiply(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    """mul, mad, fma."""
    a, b = g.get(i.operands[1], i.kind), g.get(i.operands[2], i.kind)
    op, dtype = i.parts[0], TYPES[i.kind]
    result_kind = i.kind
    if "wide" in i.parts:
        result_kind = f"{i.kind[0]}{16 * dtype.itemsize}"
        found = a.astype(TYPES[result_kind]) * b.astype(TYPES[result_kind])
    elif "hi" in i.parts:
        if dtype.itemsize == 8:
            raise Trap(f"unknown instruction: {i.text}")
        wide = TYPES[f"{i.kind[0]}64"]
        found = ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(dtype)
    elif op == "fma":
        exact = a.astype(np.float64) * b.astype(np.float64) + g.get(i.operands[3], i.kind).astype(np.float64)
        g.put(i.operands[0], exact.astype(dtype), active)
        return
    else:
        found = a * b
    if op == "mad":
        found = found + g.get(i.operands[3], result_kind)
    g.put(i.operands[0], found, active)


def _shift(a: np.ndarray, b: np.ndarray, left: bool) -> np.ndarray:
    bits = 8 * a.itemsize
    amount = np.minimum(b, bits - 1).astype(a.dtype)
    found = a << amount if left else a >> amount
    return found if not left and a.dtype.kind == "i" else np.where(b >= bits, 0, found).astype(a.dtype)


def _two(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    op, kind = i.parts[0], i.kind
    a = g.get(i.operands[1], kind)
    if op in ("shl", "shr"):
        g.put(i.operands[0], _shift(a, g.get(i.operands[2], "u32"), op == "shl"), active)
        return
    b = g.get(i.operands[2], kind)
    if op in ("and", "or", "xor") and a.dtype == bool:
        found = {"and": a & b, "or": a | b, "xor": a ^ b}[op]
    elif op in ("div", "rem") and a.dtype.kind in "iu":
        safe = np.where(b == 0, 1, b).astype(b.dtype)
        quotient = np.trunc(a.astype(np.longdouble) / safe).astype(a.dtype)
        found = quotient if op == "div" else a - quotient * safe
    elif op in ("min", "max") and a.dtype.kind == "f":
        pick = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[op]
        found = pick["NaN" in i.parts](a, b)
    else:
        found = {
            "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "div": np.divide, "min": np.minimum, "max": np.maximum,
        }[op](a, b)  # fmt: skip
    g.put(i.operands[0], found.astype(a.dtype), active)


def _one(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    a = g.get(i.operands[1], i.kind)
    one = {
        "neg": lambda: -a, "abs": lambda: np.abs(a), "not": lambda: ~a, "sqrt": lambda: np.sqrt(a),
        "rcp": lambda: 1 / a, "rsqrt": lambda: 1 / np.sqrt(a), "ex2": lambda: np.exp2(a), "lg2": lambda: np.log2(a),
        "popc": lambda: np.array([int(v).bit_count() for v in a], np.uint32),
        "clz": lambda: np.array([8 * a.itemsize - int(v).bit_length() for v in a], np.uint32),
    }[i.parts[0]]()  # fmt: skip
    g.put(i.operands[0], one.astype(a.dtype) if a.dtype.kind == "f" else one, active)


def _insert(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    """bfi: the low bits of a, so many, in the place of b's bits from a position on."""
    a, b = (g.get(operand, i.kind) for operand in i.operands[1:3])
    position, length = (g.get(operand, "u32").astype(a.dtype) for operand in i.operands[3:5])
    ones = _shift(~_shift(~np.zeros_like(a), length, True), position, True)
    g.put(i.operands[0], (_shift(a, position, True) & ones) | (b & ~ones), active)


def _shuffle(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    if i.kind != "b32":
        raise Trap(f"unknown instruction: {i.text}")
    to, _, told = i.operands[0].partition("|")
    value, b, c = g.get(i.operands[1], "b32"), g.get(i.operands[2], "s32"), g.get(i.operands[3], "s32")
    lane, mode = g.in_warp, i.parts[2]
    segment = (c >> 8) & 31
    top, bottom = (lane & segment) | (c & 31 & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | (b & ~segment & 31)}[mode]
    valid = source >= top if mode == "up" else source <= top
    source = np.where(valid, source, lane)
    asked = g.warp_first + source
    if active is not None and (~active[np.minimum(asked, g.lanes - 1)] & active).any():
        raise Trap("shuffle from a thread that does not take part")
    g.put(to, value[np.minimum(asked, g.lanes - 1)], active)
    if told:
        g.put(told, valid, active)


def _atomic(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    """Additions of integers, lane after lane."""
    dtype = TYPES[i.kind]
    if "add" not in i.parts or dtype.kind not in "iu":
        raise Trap(f"unknown instruction: {i.text}")
    returns = i.parts[0] == "atom"
    address = g.place(i.operands[1 if returns else 0])
    target, position = g.space(i.parts, address, dtype.itemsize, active)
    values, added, before = target.view(dtype), g.get(i.operands[-1], i.kind), np.zeros(g.lanes, dtype)
    for lane in range(g.lanes) if active is None else np.flatnonzero(active):
        index = position[lane] // dtype.itemsize
        before[lane] = values[index]
        values[index] += added[lane]
    if returns:
        g.put(i.operands[0], before, active)


def _nothing(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    """Fences: memory is one here."""


def _cvta(g: Grid, i: Instruction, active: np.ndarray | None) -> None:
    g.put(i.operands[0], g.get(i.operands[1], "u64"), active)


OPERATIONS: dict[str, Callable[[Grid, Instruction, np.ndarray | None], None]] = {
    "ld": _load, "st": _store, "mov": _mov, "cvt": _cvt, "cvta": _cvta, "setp": _setp, "selp": _selp, "shfl": _shuffle,
    "bfi": _insert, "atom": _atomic, "red": _atomic, "membar": _nothing, "fence": _nothing, "bar.warp": _nothing,
    **dict.fromkeys(("mul", "mad", "fma"), _multiply),
    **dict.fromkeys(("add", "sub", "and", "or", "xor", "div", "rem", "min", "max", "shl", "shr"), _two),
    **dict.fromkeys(("neg", "abs", "not", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "popc", "clz"), _one),
}  # fmt: skip
