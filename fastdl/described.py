"""Descriptions: layers, optimisers, initialisers. Dataclasses of settings that are fixed once they are made.

They are bound into Programs, which a later change would not reach. Frozen dataclasses would ask subclasses to be frozen
too, and to tidy their settings behind their own back.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABCMeta
from typing import Any


class _Sealing(ABCMeta):
    """Seals what is made, once ``__post_init__`` is done with it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.__dict__["_sealed"] = True
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The settings, for ``help``, which would show what `__call__` takes."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Described(metaclass=_Sealing):
    """Base of dataclasses whose settings are fixed; other attributes are free."""

    def _instead(self, name: str, value: Any) -> str:
        """What to do instead of assigning a setting."""
        return f"make another one, dataclasses.replace(it, {name}={value!r}), and a net with it"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).__dataclass_fields__ and "_sealed" in self.__dict__:
            raise dataclasses.FrozenInstanceError(
                f"{type(self).__name__}.{name}: settings are fixed when they are made, found an assignment of "
                f"{value!r}; {self._instead(name, value)}"
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in type(self).__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name}: a setting cannot be deleted")
        super().__delattr__(name)
