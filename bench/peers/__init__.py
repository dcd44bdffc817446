"""fastdl beside PyTorch, JAX, scikit-learn, onnxruntime and NumPy: ``python -m bench.peers``.

Equal work, dtype and threads on every side. Each library lives in a process of its own (two spinning thread pools in
one process ruin each other), pinned to as many cores as it may use threads; the processes measure in turn, and all but
one sleep. A number is the median over rounds of the ratio of a peer's median to ours in the same round.

``cases.py`` names what is compared and the bars; ``<library>_side.py`` makes a case ready in one library;
``worker.py`` is the process; ``__main__.py`` takes turns and prints.
"""
