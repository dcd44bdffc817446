"""The benchmarks' arithmetic and coverage; the benchmarks themselves run with ``pytest bench/``."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from bench import cases, compare, measure, prepare, table
from fastdl.kernels import dispatch, registry
from fastdl.kernels.registry import Array, OpSpec, Param, Tolerance

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_op_is_measured_on_every_backend():
    measured = {(c.op, c.backend) for c in cases.op_cases()}
    assert measured == {(spec.name, backend) for spec in registry.specs() for backend in ("cython", "numba")}
    in_the_table = {case.op for case, _, _ in table._rows(["tabular"]) if isinstance(case, cases.OpCase)}
    assert in_the_table == {spec.name for spec in registry.specs() if spec.letters}


def test_names_of_cases_differ():
    every = [*cases.op_cases(), *cases.chain_cases(), *cases.net_cases()]
    assert len({cases.identity(case) for case in every}) == len(every)


def test_shapes_follow_from_letters():
    shape = cases.SHAPES["L2"]
    matrix = OpSpec("a", "f", "", (Array("x", "N,I"), Array("w", "I,O")), print)
    assert cases.sizes(matrix, shape) == {"N": 256, "I": 512, "O": 512}
    flat = OpSpec("b", "f", "", (Array("w", "P"),), print)
    assert cases.sizes(flat, shape) == {"P": 256 * 512}
    labels = OpSpec("c", "f", "", (Array("source", "S"), Array("index", "N")), print)
    assert cases.sizes(labels, shape) == {"S": 256 * 64, "N": 256 * 64}


def test_plain_calls_leave_out_weights_copies_and_slopes():
    arrays = (
        Array("x", "N,C"),
        Array("weight", "N", optional=True),
        Array("scale", "1", optional=True),
        Array("b", "C", optional=True),
        Array("slope", "C", optional=True),
        Array("y", "N,C", "out"),
        Array("z", "N,C", "out", optional=True),
        Array("db", "C", "out", optional=True),
    )
    spec = OpSpec("a", "f", "", arrays, print, params=(Param("activation", "activation", "identity"),))
    assert cases.without(spec, {}) == ("weight", "scale", "slope", "z")
    assert cases.without(spec, {"activation": "prelu"}) == ("weight", "scale", "z")


def test_the_ratio_is_the_median_of_paired_ratios():
    # The machine is ten times slower in the third round, on both sides: pairs do not see it.
    found = measure.summarise([1.0, 1.0, 10.0, 1.0, 1.0], [2.0, 2.2, 20.0, 1.8, 2.0])
    assert found.ratio == pytest.approx(2.0)
    assert found.seconds == 1.0
    assert found.rounds == 5


def test_interleaving_alternates_the_order():
    seen: list[str] = []
    measure.paired(lambda: seen.append("a"), lambda: seen.append("b"), seconds=0.0, least=4)
    timed = seen[4:]  # after four looks at how long a call takes
    runs = [c for k, c in enumerate(timed) if k == 0 or timed[k - 1] != c]
    assert runs == ["b", "a", "b", "a", "b"]  # b a, a b, b a, a b: equal neighbours merge


def test_pinned_puts_back_what_it_found():
    import os

    import threadpoolctl

    def threads() -> list[int]:
        return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]

    before = (os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None), threads()
    with measure.pinned():
        assert all(count == 1 for count in threads())
        if hasattr(os, "sched_getaffinity"):
            assert len(os.sched_getaffinity(0)) == 1
    assert ((os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None), threads()) == before


def test_the_roof_is_the_larger_bound(monkeypatch):
    monkeypatch.setattr(measure, "bandwidth", lambda footprint: 1e9)
    monkeypatch.setattr(measure, "peak", lambda: 1e10)
    copy = prepare.Prepared(print, print, "", bytes=1e6, flops=1e6, footprint=1)
    product = prepare.Prepared(print, print, "", bytes=1e6, flops=1e9, footprint=1)
    assert measure.roof(copy, 1) == (pytest.approx(1e-3), "memory")
    assert measure.roof(product, 2) == (pytest.approx(0.05), "compute")


def test_bandwidth_and_peak_are_measured():
    assert measure.bandwidth(1 << 16) > 1e8
    if dispatch.load("cython") == "available":
        assert measure.peak(4) > measure.peak(8) > 1e8


def test_no_number_on_a_wrong_result():
    tolerance, eps = Tolerance(ulp=2.0, norm=0.0), float(np.finfo(np.float32).eps)
    want = np.array([1.0, np.nan, np.inf, 0.0])
    assert prepare.close(want.copy(), want, tolerance, eps)
    assert prepare.close(want * (1 + eps), want, tolerance, eps)
    for k, value in enumerate((1 + 3 * eps, 0.0, 1.0, 1e-9)):
        got = want.copy()
        got[k] = value
        assert not prepare.close(got, want, tolerance, eps), k
    assert not prepare.close(np.array([1, 2]), np.array([1, 3]), tolerance, eps)

    many, off = np.ones(1000), np.ones(1000)
    off[:5] = 2
    assert prepare.close(off, many, tolerance, eps, misses=0.01)
    assert not prepare.close(off, many, tolerance, eps, misses=0.001)


def test_a_red_case_raises(monkeypatch):
    case = cases.OpCase("relu_forward", 0, "odd", "numpy")
    prepare.prepare(case)
    monkeypatch.setattr(prepare.dispatch, "call", lambda impl, arrays, arguments, threads: arrays[1].fill(1))
    with pytest.raises(AssertionError, match="y differs from the reference"):
        prepare.prepare(case)


def _round(**ratios: float) -> dict[str, dict[str, float]]:
    return {case: {"ratio": r, "seconds": 1e-3 / r} for case, r in ratios.items()}


def test_verdict_of_the_same_commit():
    a = [_round(relu=r, dense=1.0) for r in (3.0, 3.1, 2.9, 9.0, 3.0)]
    b = [_round(relu=r, dense=1.0) for r in (3.1, 3.0, 3.0, 3.0, 2.95)]
    change = compare.changes(a, b)
    assert abs(change["relu"]) < 0.05
    assert change["dense"] == 0
    assert compare.slower(change, 0.1) == []


def test_verdict_of_a_case_that_takes_twice_the_time():
    a = [_round(relu=r, dense=1.0) for r in (3.0, 3.1, 2.9, 3.0, 3.0)]
    b = [_round(relu=r / 2, dense=1.05) for r in (3.1, 3.0, 3.0, 3.0, 2.95)]
    change = compare.changes(a, b)
    assert change["relu"] == pytest.approx(1.0, abs=0.1)
    assert compare.slower(change, 0.1) == ["relu"]
    assert compare.slower(compare.changes(a, b, absolute=True), 0.1) == ["relu"]


def test_verdict_leaves_out_what_one_side_lacks():
    assert compare.changes([_round(relu=1.0, new=1.0)], [_round(relu=1.0)]) == {"relu": 0.0}
    assert compare.changes([_round(relu=1.0)], [_round(relu=1.0, new=1.0)]) == {"relu": 0.0}


def test_only_families_that_changed_are_built_again():
    assert compare.stale([]) == []
    assert compare.stale(["kernels/registry.py", "kernels/dense/README.md", "kernels/losses/reference.py"]) == []
    assert compare.stale(["kernels/losses/_cython.pyx", "kernels/dense/native.cpp"]) == ["dense", "losses"]
    assert compare.stale(["kernels/dense/native.hpp"]) is None  # other families may include it
    assert compare.stale(["setup.py"]) is None


def test_compare_names_an_unknown_ref(capsys):
    assert compare.main(["no-such-ref", "no-such-ref"]) == 2
    assert "bench/compare.py: git" in capsys.readouterr().err


def test_markdown_is_aligned():
    lines = table.markdown(["op", "ratio"], [["relu_forward", "1.25"], ["dense", "10.00"]]).splitlines()
    assert lines[0] == "| op           | ratio |"
    assert lines[1] == "| ------------ | ----: |"
    assert lines[3] == "| dense        | 10.00 |"


def test_table_renders_missing_backends_and_rows():
    machine = {"cpu": "a CPU", "level": "avx2", "numpy": "2", "numba": "none", "python": "3"}
    results = [
        {"row": "relu_forward", "column": "cython", "ratio": 1.234},
        {"row": "relu_forward", "column": "numba", "ratio": None},
        {"row": "step", "column": "cython", "ratio": 3.0},
    ]
    text = table.render(results, machine)
    assert "a CPU, level avx2" in text
    assert "| relu_forward   |   1.23 |     - |" in text
    assert "| step           |   3.00 |       |" in text


def test_block_of_the_readme_is_replaced():
    text = "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n"
    assert table.replace_block(text, "new") == "before\n<!-- bench:begin -->\nnew\n<!-- bench:end -->\nafter\n"
    with pytest.raises(SystemExit, match="no lines"):
        table.replace_block("nothing", "new")


@pytest.mark.parametrize(("seconds", "text"), [(1.5, "1.5 s"), (2.5e-3, "2.5 ms"), (3e-7, "0.3 us")])
def test_durations(seconds, text):
    assert table.duration(seconds) == text
