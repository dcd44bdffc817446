"""The random streams: known answers, the epoch's permutation, initial values; the same bits on every back end."""

from __future__ import annotations

import itertools
import math
import pathlib
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fastdl.kernels import dispatch
from fastdl.kernels.random import reference

KNOWN = pathlib.Path(__file__).with_name("philox.txt")
LAYER = 1 << 30


def known_answers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counters (3, 4), keys (3, 2) and words (3, 4)."""
    lines = [line for line in KNOWN.read_text().splitlines() if line and not line.startswith("#")]
    fields = [[[int(word, 16) for word in part.split()] for part in line.split("|")] for line in lines]
    counters, keys, words = (np.array(column, np.uint32) for column in zip(*fields, strict=True))
    return counters, keys, words


# ------------------------------------------------------------------------------------------------ the generator
def test_known_answers(runner: Any) -> None:
    counters, keys, words = known_answers()
    assert len(counters) == 3
    for counter, key, want in zip(counters, keys, words, strict=True):
        out = np.zeros((1, 4), np.uint32)
        dispatch.run("philox4x32", counter[None], key, out, backend=runner.backend)
        np.testing.assert_array_equal(out[0], want)


def test_many_counters(runner: Any, rng: np.random.Generator) -> None:
    counter = rng.integers(0, 2**32, (8200, 4), dtype=np.uint32)
    key = rng.integers(0, 2**32, 2, dtype=np.uint32)
    want = np.zeros_like(counter)
    dispatch.run("philox4x32", counter, key, want, backend="numpy")
    for threads in (1, 2, 3, 4):
        out = np.zeros_like(counter)
        dispatch.run("philox4x32", counter, key, out, backend=runner.backend, threads=threads)
        np.testing.assert_array_equal(out, want)


# ------------------------------------------------------------------------------------------------ the permutation
def permutation(backend: str, n: int, seed: int = 0, epoch: int = 0, threads: int = 1) -> np.ndarray:
    index = np.full(n, -1, np.int64)
    dispatch.run("epoch_indices", index, backend=backend, threads=threads, n=n, seed=seed, epoch=epoch, offset=0)
    return index


def test_bijection_for_every_small_n(runner: Any) -> None:
    for n in range(1, 301):
        np.testing.assert_array_equal(np.sort(permutation(runner.backend, n, seed=n, epoch=3)), np.arange(n))


@pytest.mark.parametrize("n", [1797, 65537])
def test_bijection(runner: Any, n: int) -> None:
    first = permutation(runner.backend, n, seed=7)
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    np.testing.assert_array_equal(first, permutation("numpy", n, seed=7))
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(permutation(runner.backend, n, seed=7, threads=threads), first)
    for other in ({"seed": 8}, {"seed": 7 + (1 << 32)}, {"seed": 7, "epoch": 1}):
        same = np.sum(permutation(runner.backend, n, **other) == first)
        assert same < 12, "two random permutations have about one value in the same place"
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("n", [70, 1797, 70001])
@pytest.mark.parametrize("offset", [0, 1, 64, 69])
def test_resumes_at_any_offset(runner: Any, n: int, offset: int) -> None:
    whole = permutation(runner.backend, n, seed=3, epoch=5)
    part = np.full(min(200, n - offset), -1, np.int64)
    where = {"n": n, "seed": 3, "epoch": 5, "offset": offset}
    dispatch.run("epoch_indices", part, backend=runner.backend, **where)
    np.testing.assert_array_equal(part, whole[offset : offset + len(part)])


def test_positions_wrap_around(runner: Any) -> None:
    whole = permutation(runner.backend, 100, seed=1)
    index = np.full(250, -1, np.int64)
    dispatch.run("epoch_indices", index, backend=runner.backend, n=100, seed=1, epoch=0, offset=40)
    np.testing.assert_array_equal(index, whole[np.arange(40, 290) % 100])


@pytest.mark.parametrize("n", [(1 << 31) + 11, 1 << 40])
def test_huge_data_sets(runner: Any, n: int) -> None:
    index, want = np.full(1000, -1, np.int64), np.full(1000, -1, np.int64)
    where = {"n": n, "seed": (1 << 64) - 1, "epoch": 2, "offset": n - 1000}
    dispatch.run("epoch_indices", index, backend=runner.backend, **where)
    dispatch.run("epoch_indices", want, backend="numpy", **where)
    np.testing.assert_array_equal(index, want)
    assert index.min() >= 0
    assert index.max() < n
    assert len(np.unique(index)) == 1000
    assert abs(index.mean() / n - 0.5) < 5 * math.sqrt(1 / 12 / 1000)


def test_small_permutations_are_equally_likely() -> None:
    """Chi-square over all 24 permutations of 4: mean 23, standard deviation 6.8; fixed seeds, so no luck involved."""
    epochs = 2400
    seen = Counter(tuple(permutation("auto", 4, seed=3, epoch=e).tolist()) for e in range(epochs))
    want = epochs / 24
    chi = sum((seen[p] - want) ** 2 / want for p in itertools.permutations(range(4)))
    assert chi < 23 + 5 * 6.8


# ------------------------------------------------------------------------------------------------ initial values
def values(
    op: str, backend: str, count: int, dtype: Any = np.float64, threads: int = 1, **arguments: Any
) -> np.ndarray:
    out = np.full(count, np.nan, dtype)
    dispatch.run(op, out, backend=backend, threads=threads, **({"seed": 42, "layer": LAYER} | arguments))
    return out


OPS = (
    ("uniform", {"low": -0.3, "high": 0.7}),
    ("normal", {"mean": 0.1, "std": 0.37}),
    ("truncated_normal", {"mean": 0.1, "std": 0.37}),
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("op", "arguments"), OPS)
def test_same_bits_everywhere(runner: Any, op: str, arguments: dict[str, float], dtype: type) -> None:
    want = values(op, "numpy", 50_001, dtype, **arguments)
    for threads in (1, 2, 3, 4):
        np.testing.assert_array_equal(values(op, runner.backend, 50_001, dtype, threads, **arguments), want)
    np.testing.assert_array_equal(want, values(op, "numpy", 50_001, np.float64, **arguments).astype(dtype))


@pytest.mark.parametrize("count", [0, 1, 2, 127, 128, 129])
@pytest.mark.parametrize(("op", "arguments"), OPS)
def test_an_element_does_not_depend_on_the_size(runner: Any, op: str, arguments: dict[str, float], count: int) -> None:
    whole = values(op, "numpy", 300, **arguments)
    np.testing.assert_array_equal(values(op, runner.backend, count, **arguments), whole[:count])


@pytest.mark.parametrize(("op", "arguments"), OPS)
def test_seed_and_parameter_matter(backend: str, op: str, arguments: dict[str, float]) -> None:
    first = values(op, backend, 100, **arguments)
    for other in ({"seed": 43}, {"seed": 42 + (1 << 32)}, {"layer": LAYER + 1}):
        assert not np.any(values(op, backend, 100, **(arguments | other)) == first)


def test_uniform_is_the_documented_function_of_the_words(backend: str) -> None:
    counter = np.array([[e // 2, 0, LAYER, 0] for e in range(10)], np.uint32)
    words = np.zeros_like(counter)
    dispatch.run("philox4x32", counter, np.array([42, 0], np.uint32), words, backend=backend)
    want = [(((int(w[2 * (e % 2) + 1]) << 32 | int(w[2 * (e % 2)])) >> 12) + 0.5) / 2**52 for e, w in enumerate(words)]
    np.testing.assert_array_equal(values("uniform", backend, 10), want)


def test_moments(backend: str) -> None:
    n = 200_000
    u = values("uniform", backend, n, low=-2.0, high=4.0)
    assert u.min() >= -2
    assert u.max() <= 4
    assert abs(u.mean() - 1) < 5 * math.sqrt(3 / n)
    assert abs(u.var() / 3 - 1) < 5 * math.sqrt(0.8 / n)
    z = values("normal", backend, n, mean=0.5, std=2.0)
    assert abs(z.mean() - 0.5) < 5 * 2 / math.sqrt(n)
    assert abs(z.var() / 4 - 1) < 5 * math.sqrt(2 / n)
    assert abs(np.mean(((z - 0.5) / 2) ** 4) - 3) < 5 * math.sqrt(96 / n)
    t = values("truncated_normal", backend, n, mean=-1.0, std=0.1)
    assert np.abs(t + 1).max() <= 0.2
    assert abs(t.mean() + 1) < 5 * 0.088 / math.sqrt(n)
    assert abs(t.std() / 0.1 - 0.879626) < 0.01


def test_quantile_is_the_normal_distribution() -> None:
    """Against the standard library's AS 241, which uses libm's log, in the centre and both tails."""
    p = np.concatenate([np.linspace(0, 1, 2003)[1:-1], np.logspace(-16, -1, 500), [2.0**-53, 1 - 2.0**-53]])
    want = np.array([statistics.NormalDist().inv_cdf(x) for x in p])
    np.testing.assert_allclose(reference.quantile(p), want, rtol=2e-15, atol=1e-16)
    assert statistics.NormalDist().cdf(-2) == pytest.approx(reference.TAIL, rel=1e-15)


def test_log_is_within_one_ulp() -> None:
    x = np.concatenate([np.logspace(-300, 300, 4001), np.linspace(0.5, 2, 4001)])
    want = np.array([math.log(v) for v in x])
    assert np.all(np.abs(reference.log(x) - want) <= np.spacing(np.abs(want)))
