"""The mapping through which a user reads and writes a model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from fastdl import convert
from fastdl.run.arena import Arena
from fastdl.run.lock import NetLocks
from fastdl.run.storage import Memory


class Weights(MutableMapping[str, np.ndarray]):
    """Named tensors of a model: reading copies out in plain layout, assigning copies in.

    Shapes are those of the layer: kernels (I, O), vectors (O,). The memory is looked up at each access, so that a
    mapping that somebody keeps follows the net to another back end.

    Parameters
    ----------
    names : list of str
    memory : callable
        Where the tensors are now.
    locks : NetLocks
        That of the memory is held around each access.
    gradients : bool
        The gradients of the parameters, which cannot be assigned.
    """

    def __init__(
        self, names: list[str], memory: Callable[[], Memory], locks: NetLocks, gradients: bool = False
    ) -> None:
        self._names, self._memory, self._locks, self._gradients = names, memory, locks, gradients

    def _place(self, name: str) -> tuple[Arena, np.ndarray]:
        memory = self._memory()
        if name in memory.parameters.layout.offsets:
            return memory.parameters, memory.gradients if self._gradients else memory.parameters.values
        if not self._gradients and name in memory.states.layout.offsets:
            return memory.states, memory.states.values
        raise KeyError(f"no tensor {name!r}; the model has {', '.join(self._names)}")

    def __getitem__(self, name: str) -> np.ndarray:
        with self._locks.memory:
            arena, values = self._place(name)
            self._memory().pull()
            return arena.read(name, values)

    def __setitem__(self, name: str, value: Any) -> None:
        self.assign({name: value})

    def assign(self, values: Mapping[str, Any]) -> None:
        """Copy several tensors in, all or none.

        Raises
        ------
        KeyError, ValueError, TypeError
            An unknown name, another shape, something else than numbers, or a value beyond the model's dtype; nothing
            has been written then.
        """
        if self._gradients:
            raise TypeError("gradients are read-only here; they are written by backward()")
        with self._locks.memory:
            checked = [self._checked(name, value) for name, value in values.items()]
            memory = self._memory()
            memory.pull()
            for arena, name, value in checked:
                arena.write(name, value)
            memory.changed()

    def _checked(self, name: str, value: Any) -> tuple[Arena, str, np.ndarray]:
        arena, _ = self._place(name)
        value, shape = convert.as_numbers(value, name), arena.layout.shapes[name]
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {value.shape}")
        return arena, name, convert.cast(value, arena.dtype, name)

    def __delitem__(self, name: str) -> None:
        raise TypeError("tensors of a model cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return "\n".join(f"{name} {self[name].shape}" for name in self)
