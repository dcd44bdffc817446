"""Performance tracking: against NumPy call by call in one process, and against the machine's roofline.

``pytest bench/``             benchmarks generated from registry x cases (`cases`, `prepare`, `measure`)
``python bench/table.py``     the README's table
``python bench/compare.py``   two git refs against each other
"""
