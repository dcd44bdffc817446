"""scikit-learn: `MLPClassifier` has no batch norm and no dropout, so only plain nets."""

from __future__ import annotations

import numpy as np
from sklearn.neural_network import MLPClassifier

from bench.cases import NETS
from bench.peers.data import batch
from bench.peers.worker import Missing, Work


def step(net: str, entry: str, threads: int, variant: str, plain: bool = False) -> Work:
    if not plain:
        raise Missing("no batch norm, no dropout")
    found = NETS[net]
    X, y = batch(found)
    model = MLPClassifier(found.widths[1:-1], solver="adam", alpha=0.0, batch_size=found.batch, shuffle=False)
    model.partial_fit(X, y, classes=np.arange(found.widths[-1]))
    return Work(lambda: model.partial_fit(X, y))
