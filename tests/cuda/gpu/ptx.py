"""A kernel's PTX, parsed into instructions, registers, constants and the layout of shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

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


@dataclass
class Instruction:
    """One line of PTX: its guard, the name's parts, the operands."""

    guard: str
    negated: bool
    parts: list[str]
    operands: list[str]
    text: str

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
