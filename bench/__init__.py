"""Performance tracking: against NumPy call by call in one process, other libraries, and the machine's roofline.

``pytest bench/``             benchmarks generated from registry x cases (`cases`, `prepare`, `measure`)
``python bench/table.py``     the README's table
``python bench/compare.py``   two git refs against each other
``python -m bench.peers``     PyTorch, JAX, scikit-learn, onnxruntime, in processes of their own

Imported before NumPy, this package takes the shell's settings of OpenBLAS out of the environment: a forced
``OPENBLAS_CORETYPE=Haswell`` halves the baseline's dense products on a CPU with AVX-512 (115 instead of 220 Gflop/s).
"""

import os
import sys
import warnings

_FORCED = sorted(name for name in os.environ if name.startswith("OPENBLAS_") and name != "OPENBLAS_NUM_THREADS")
if _FORCED and "numpy" in sys.modules:
    warnings.warn(f"NumPy was loaded with {', '.join(_FORCED)}: its times may not be its own", stacklevel=2)
for _name in _FORCED:
    del os.environ[_name]
