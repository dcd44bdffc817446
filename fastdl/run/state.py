"""`TrainState`: how far a training has come. The model owns it, the trainer works on it, a file keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.checks import whole
from fastdl.optimizers import check_lr

#: Counters have 32 bits. After the last step comes the first again, so masks repeat after 4e9 steps. Moments of that
#: many updates age no more.
MOST = 2**32 - 1


@dataclass
class TrainState:
    """How far a training has come.

    Parameters
    ----------
    step : int
        Position in the random streams: dropout draws the masks of this step.
    update : int
        Updates that the optimiser's moments have seen; bias corrections count from it.
    epoch : int
        Epochs finished; it keys the permutation of the next one.
    offset : int
        Rows of the running epoch that are done.
    rows : int
        Rows of the training passes since the last update: those of the next pass count on from here.
    lr : float
        Learning rate in use.
    stop : bool
        The training ends after the running epoch.
    totals : (4,) float64
        Sums of the running epoch: loss times mass, mass, correct, rows.
    """

    step: int = 0
    update: int = 0
    epoch: int = 0
    offset: int = 0
    rows: int = 0
    lr: float = 0.0
    stop: bool = False
    totals: np.ndarray = field(default_factory=lambda: np.zeros(4))

    def advance(self) -> None:
        """One step of the optimiser is done."""
        self.step, self.update, self.rows = (self.step + 1) & MOST, min(self.update + 1, MOST), 0

    def to_config(self) -> dict[str, Any]:
        """JSON values; `from_config` reads them."""
        values = {name: getattr(self, name) for name in ("step", "update", "epoch", "offset", "rows")}
        return values | {"lr": float(self.lr), "stop": bool(self.stop), "totals": self.totals.tolist()}

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> TrainState:
        """The state that `to_config` described.

        Raises
        ------
        ValueError, TypeError, KeyError
            A value is missing or outside its range.
        """
        counts = {name: whole(values[name], name) for name in ("step", "update", "epoch")}
        counts |= {name: whole(values[name], name, 62) for name in ("offset", "rows")}
        totals = np.array(values["totals"], np.float64)
        if totals.shape != (4,):
            raise ValueError(f"totals: expected 4 numbers, found shape {totals.shape}")
        return cls(**counts, lr=check_lr(values["lr"]), stop=bool(values["stop"]), totals=totals)
