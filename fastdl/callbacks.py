"""What can run between epochs: early stopping, learning-rate schedules, functions of your own.

``fit`` calls ``on_train_begin()``, then for each epoch ``on_epoch_begin(epoch)`` and ``on_epoch_end(epoch, logs)``,
then ``on_train_end()``. ``logs`` maps the names of the history (``loss``, ``val_loss``, ...) to this epoch's values.
Setting ``self.model.stop_training = True`` ends the training after the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastdl import checks


class Callback:
    """Base of all callbacks; ``model`` is set by ``fit``."""

    model: Any = None

    def on_train_begin(self) -> None: ...

    def on_epoch_begin(self, epoch: int) -> None: ...

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None: ...

    def on_train_end(self) -> None: ...


def as_list(callbacks: Callback | Iterable[Callback] | None) -> list[Callback]:
    """What ``fit(callbacks=)`` takes, as a list: several callbacks, one, or none."""
    if callbacks is None:
        return []
    if isinstance(callbacks, Callback):
        return [callbacks]
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks: expected callbacks in a list, found {callbacks!r}")
    several = list(callbacks)
    for callback in several:
        if not isinstance(callback, Callback):
            hint = "; make one, with ()" if isinstance(callback, type) and issubclass(callback, Callback) else ""
            raise TypeError(f"callbacks: expected objects of fastdl.callbacks.Callback, found {callback!r}{hint}")
    return several


def _function(fn: Any, name: str) -> Any:
    if not callable(fn):
        raise TypeError(f"{name}: expected a function, found {fn!r}")
    return fn


class EarlyStopping(Callback):
    """Stop when a watched value has not improved for ``patience`` epochs.

    Parameters
    ----------
    monitor : str
        A name of the history.
    patience : int
        Stop after so many epochs in a row without an improvement, as in Keras: 1 stops at the first, 3 at the third. 0
        stops at the first too.
    min_delta : float
        An improvement must be larger than this.
    mode : {"auto", "min", "max"}
        ``"auto"``: larger is better for names that end in ``accuracy`` or ``r2``, smaller for all others.
    restore_best_weights : bool
        End with the parameters and running statistics of the best epoch, whether the training was stopped or ran out.

    Notes
    -----
    NaN is never an improvement. ``best_epoch`` and ``best`` hold the best epoch (from 0) and its value,
    ``stopped_epoch`` the epoch that stopped the training, or None.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: str = "auto",
        restore_best_weights: bool = True,
    ) -> None:
        if not isinstance(monitor, str):
            raise ValueError(f"monitor: expected a name of the history, like 'val_loss', found {monitor!r}")
        if not isinstance(mode, str) or mode not in ("auto", "min", "max"):
            raise ValueError(f"mode: expected auto, min or max, found {mode!r}")
        self.monitor = monitor
        self.patience = checks.whole(patience, "patience", 63)
        self.min_delta = checks.NOT_NEGATIVE.check(min_delta, "min_delta")
        self.restore_best_weights = checks.flag(restore_best_weights, "restore_best_weights")
        larger = mode == "max" or (mode == "auto" and monitor.endswith(("accuracy", "r2")))
        self._sign = 1.0 if larger else -1.0
        self.on_train_begin()

    def on_train_begin(self) -> None:
        self.best = -self._sign * math.inf
        self.best_epoch: int | None = None
        self.stopped_epoch: int | None = None
        self._state: Any = None
        self._waited = 0

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None:
        if self.monitor not in logs:
            raise ValueError(
                f"EarlyStopping watches {self.monitor!r}, which fit does not report; it reports {', '.join(logs)} "
                "(val_ values need validation_data or validation_split)"
            )
        value = float(logs[self.monitor])
        if self._sign * (value - self.best) > self.min_delta:
            self.best, self.best_epoch, self._waited = value, epoch, 0
            if self.restore_best_weights:
                self._state = self.model.get_state()
            return
        self._waited += 1
        if self._waited >= self.patience:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def on_train_end(self) -> None:
        if self._state is not None:
            self.model.set_state(self._state)
            self._state = None


class LearningRateSchedule(Callback):
    """Set the learning rate of every epoch: ``fn(epoch) -> lr``, epochs from 0."""

    def __init__(self, fn: Callable[[int], float]) -> None:
        self.fn = _function(fn, "LearningRateSchedule fn")

    def on_epoch_begin(self, epoch: int) -> None:
        self.model.lr = checks.LEARNING_RATE.check(self.fn(epoch), f"learning rate of the schedule for epoch {epoch}")


class LambdaCallback(Callback):
    """Functions as a callback; each takes what the method of its name takes."""

    def __init__(
        self,
        on_train_begin: Callable[[], None] | None = None,
        on_epoch_begin: Callable[[int], None] | None = None,
        on_epoch_end: Callable[[int, Mapping[str, float]], None] | None = None,
        on_train_end: Callable[[], None] | None = None,
    ) -> None:
        given = {
            "on_train_begin": on_train_begin,
            "on_epoch_begin": on_epoch_begin,
            "on_epoch_end": on_epoch_end,
            "on_train_end": on_train_end,
        }
        for name, fn in given.items():
            if fn is not None:
                setattr(self, name, _function(fn, name))
