"""Bits: the compiled back end gives the same ones for every number of threads, the others from run to run."""

from __future__ import annotations

import pytest

from fastdl.kernels import registry

from . import cases, checks

SPECS = registry.specs()
#: Large enough to split by panels, by blocks of rows and by blocks of a flat array; odd, so that shares are unequal.
LARGE = ({"N": 519, "C": 71, "I": 67, "O": 97, "P": 150_001}, {"N": 37, "C": 1031, "I": 517, "O": 131, "P": 16_411})


def large_calls(spec, dtype):
    for k, variant in enumerate(cases.variants(spec)):
        size = {letter: LARGE[k % 2].get(letter, 301) for letter in spec.letters}
        yield cases.draw(spec, cases.rng("threads", spec.name, k), size, dtype, variant, step=cases.STEPS[k % 2])
        if k == 0:
            size = {letter: LARGE[1].get(letter, 301) for letter in spec.letters}
            yield cases.draw(spec, cases.rng("threads", spec.name), size, dtype, variant)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiled_bits_do_not_depend_on_threads(spec, dtype, level):
    for layout in ("plain", "panels"):
        for call in large_calls(spec, dtype):
            checks.same_bits(call, "cython", (1, 2, 3, 4, 2), layout)


@pytest.mark.best_level
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bits_from_run_to_run(spec, threads, runner):
    for call in large_calls(spec, cases.DTYPES[0]):
        checks.same_bits(call, runner.backend, (threads,) * 3)
