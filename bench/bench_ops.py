"""Every op on every back end and shape, and the fused chains of layers, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cases import Case, chain_cases, identity, op_cases


@pytest.mark.parametrize("case", op_cases(), ids=identity)
def bench_op(case: Case, track: Callable[[Case], None]) -> None:
    track(case)


@pytest.mark.parametrize("case", chain_cases(), ids=identity)
def bench_chain(case: Case, track: Callable[[Case], None]) -> None:
    track(case)
