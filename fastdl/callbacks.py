"""What can run between epochs: early stopping, learning-rate schedules, functions of your own.

``fit`` calls ``on_train_begin()``, then for each epoch ``on_epoch_begin(epoch)`` and ``on_epoch_end(epoch, logs)``,
then ``on_train_end()``. ``logs`` maps the names of the history (``loss``, ``val_loss``, ...) to this epoch's values.
Setting ``self.model.stop_training = True`` ends the training after the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


class Callback:
    """Base of all callbacks; ``model`` is set by ``fit``."""

    model: Any = None

    def on_train_begin(self) -> None: ...

    def on_epoch_begin(self, epoch: int) -> None: ...

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None: ...

    def on_train_end(self) -> None: ...


class EarlyStopping(Callback):
    """Stop when a watched value has not improved for ``patience`` epochs.

    Parameters
    ----------
    monitor : str
        A name of the history.
    patience : int
        Epochs without improvement that are borne; 0 stops at the first.
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
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode must be auto, min or max, found {mode!r}")
        if patience < 0:
            raise ValueError(f"patience must be 0 or more, found {patience}")
        if min_delta < 0:
            raise ValueError(f"min_delta must be 0 or more, found {min_delta}")
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.restore_best_weights = restore_best_weights
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
        self.fn = fn

    def on_epoch_begin(self, epoch: int) -> None:
        lr = float(self.fn(epoch))
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"the schedule gave the learning rate {lr} for epoch {epoch}, expected 0 or more")
        self.model.lr = lr


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
                setattr(self, name, fn)
