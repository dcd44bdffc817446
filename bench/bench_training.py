"""Training steps of the five nets on every back end, against the NumPy back end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cases import Case, identity, net_cases


@pytest.mark.parametrize("case", net_cases(), ids=identity)
def bench_step(case: Case, track: Callable[[Case], None]) -> None:
    track(case)
