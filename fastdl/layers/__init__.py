"""Layers: ``Dense BatchNorm Dropout``, and one per activation (``ReLU``, ``PReLU``, ``GELU``, ``Softmax``, ...)."""

from __future__ import annotations

from fastdl.layers import activations as _activations
from fastdl.layers.activations import GELU, Activation, PReLU
from fastdl.layers.base import Layer
from fastdl.layers.core import BatchNorm, Dense, Dropout

for _cls in _activations.BY_NAME.values():
    globals()[_cls.__name__] = _cls

__all__ = ["GELU", "Activation", "BatchNorm", "Dense", "Dropout", "Layer", "PReLU"]
__all__ += sorted({cls.__name__ for cls in _activations.BY_NAME.values()} - set(__all__))
