"""What each instruction of PTX does to all lanes of a grid: one function for each kind, named in `OPERATIONS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gpu.ptx import TYPES, Instruction, Trap

if TYPE_CHECKING:
    from gpu.interpreter import Grid


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
