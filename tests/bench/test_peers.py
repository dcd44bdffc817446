"""bench/peers: what becomes of the rounds, and one case through a real process."""

from __future__ import annotations

import pytest

import fastdl as fd

peers = pytest.importorskip("bench.peers.__main__", reason="the bench folder is not beside the tests")
cases = pytest.importorskip("bench.peers.cases")


def case(**bars: float) -> cases.Case:
    return cases.Case("step tiny train_on_batch, 1T", "step", {"net": "tiny", "entry": "train_on_batch"}, bars=bars)


def test_ratios_are_medians_over_rounds_and_the_best_peer_counts() -> None:
    times = {"fastdl": [1.0, 2.0, 1.0], "torch": [3.0, 6.0, 9.0], "jax": [2.0, 2.0, 4.0]}
    found = peers.result(case(best=2.5, torch=3.0), times, [], {})
    assert found["ratios"] == {"torch": 3.0, "jax": 2.0}
    assert found["best"] == "jax"
    assert found["met"] == {"best": False, "torch": True}


def test_a_missing_peer_misses_its_bar_and_says_why() -> None:
    found = peers.result(case(torch=1.0), {"fastdl": [1.0]}, [], {"torch": "not installed"})
    assert found["met"] == {"torch": False}
    assert "not installed" in " ".join(peers.cell(found))


def test_shares_and_starts_have_bars_of_their_own() -> None:
    assert peers.result(case(share=0.85), {"fastdl": [1.0]}, [0.8, 0.9, 0.95], {})["met"] == {"share": True}
    assert peers.result(case(seconds=0.5), {"fastdl": [0.4, 0.6, 0.7]}, [], {})["met"] == {"seconds": False}


def test_two_threads_are_compared_with_one() -> None:
    one = {"case": "step wide train_on_batch, 1T", "seconds": {"fastdl": 2.0}}
    two = {"case": "step wide train_on_batch, 2T", "seconds": {"fastdl": 1.0}}
    (line,) = peers.scaling([one, two])
    assert line["share"] == 2.0
    assert line["met"] == {"share": True}


def test_names_are_unique_and_bars_have_their_peers() -> None:
    found = cases.cases()
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.bars) <= {*c.peers, "best", "share", "seconds"}
        assert c.peers or "best" not in c.bars


def test_no_side_gets_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("FASTDL_BACKEND", "numpy")
    kept = peers.environment(case())
    assert "OPENBLAS_CORETYPE" not in kept
    assert "FASTDL_BACKEND" not in kept


@pytest.mark.skipif(fd.backends()["cython"] != "available", reason="the compiled back end is not built")
def test_a_case_through_its_processes() -> None:
    sides = peers.Sides()
    try:
        made = cases.Case("tiny", "step", {"net": "tiny", "entry": "train_on_batch"}, ("numpy", "nobody"))
        found = peers.compare(made, sides, seconds=0.01, rounds=2)
    finally:
        sides.close()
    assert found["ratios"]["numpy"] > 0
    assert "nobody" in found["notes"]
