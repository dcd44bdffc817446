"""Compiled kernels, one folder per op family, imported as ``fastdl.kernels``."""

if __name__ != "fastdl.kernels":
    raise ImportError(
        "this folder is the package fastdl.kernels, not a top-level module: run `pip install -e .` and import fastdl"
    )

#: Families in the order in which they are loaded; each has a ``reference.py`` that declares its ops.
FAMILIES = ("activations", "dense", "batchnorm", "dropout", "losses", "optimizers", "random", "gather")
