"""Stateless ops on arrays: ``<op>_forward(...) -> (y, ctx)``, ``<op>_backward(dy, ctx) -> gradients``.

Every function takes ``out=`` where it has one main result, ``backend=`` ("auto", "cython", "numba", "numpy", "cuda")
and ``threads=``. NumPy arrays are float32 or float64 of one dtype and never cast or copied: any row stride is taken,
columns must be adjacent (dense products also take transposed views). ``out is x`` is allowed for element-wise ops; any
other overlap of an array that is written (``out``, running statistics, parameters, moments) is refused. Wrong arguments
raise before anything is written.

A context holds the arrays of its forward call, not copies: write to x or y only after the backward call, or the
gradient is that of what you wrote. Reshape x and y in place as you like; NumPy refuses to resize them until the context
is gone.

Arrays in GPU memory (CuPy, PyTorch, Numba, JAX) are shared without a copy and run on CUDA, float32 in contiguous rows;
results are `fastdl.cuda.arrays.DeviceArray`, which those libraries take the same way. All arrays of a call lie in one
memory.

Values too small for a normal number (below 1.2e-38 in float32) stay what they are here and on the NumPy and Numba back
ends; a model on the compiled back end takes them as zeros.

The functions of the element-wise activations (``relu_forward``, ``relu_backward``, ...) are made from the registry.
"""

from __future__ import annotations

from fastdl.ops.activations import FUNCTIONS as _FUNCTIONS
from fastdl.ops.call import Context
from fastdl.ops.dense import dense_backward, dense_forward
from fastdl.ops.dropout import dropout_backward, dropout_forward
from fastdl.ops.losses import binary_cross_entropy, mse, softmax_cross_entropy
from fastdl.ops.normalization import batchnorm_backward, batchnorm_forward
from fastdl.ops.optimizers import adam_step, sgd_step

globals().update(_FUNCTIONS)

__all__ = [
    "Context",
    "adam_step",
    "batchnorm_backward",
    "batchnorm_forward",
    "binary_cross_entropy",
    "dense_backward",
    "dense_forward",
    "dropout_backward",
    "dropout_forward",
    "mse",
    "sgd_step",
    "softmax_cross_entropy",
]
__all__ += sorted(_FUNCTIONS)
