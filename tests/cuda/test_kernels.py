"""The CUDA kernels without a GPU: every op's launches, carried out by the interpreter, against the float64 references.

Calls are those of the contract tests, from the registry: no op is known by name here.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from contract import cases, checks

from fastdl.cuda import ahead
from fastdl.kernels import dispatch, registry
from fastdl.kernels.common import cubins, numba_cuda
from fastdl.kernels.common.gpu import Kernel, Launch

if numba_cuda.MISSING:
    pytest.skip(numba_cuda.MISSING, allow_module_level=True)

from gpu.device import Interpreted, from_bfloat16, to_bfloat16

dispatch.load_cuda()
SPECS = [spec for spec in registry.specs() if registry.find(spec.name, "cuda")]
#: Elements between rows, bytes off the alignment.
LAYOUTS = ((0, 0), (3, 0), (8, 0), (0, 4))
#: Calls of an op that a test without --full runs.
SLICE = 10


def rounded(x: np.ndarray) -> np.ndarray:
    return from_bfloat16(to_bfloat16(x))


def calls(spec: registry.OpSpec, full: bool) -> list[cases.Call]:
    """The contract's float32 calls, a slice of them."""
    found = list(cases.calls(spec, np.dtype(np.float32), full))
    return found if full else found[:: max(1, len(found) // SLICE)]


def stored_as(array: registry.Array, dtype: str) -> str:
    """Parameters, statistics and targets stay float32 beside matrices of bfloat16."""
    return dtype if array.dtype == "T" and not array.single else ""


def run(call: cases.Call, dtype: str, layout: tuple[int, int], device: Interpreted) -> dict[str, np.ndarray | None]:
    spec, impl = call.spec, registry.find(call.spec.name, "cuda")
    views = [device.put(x, stored_as(array, dtype), *layout) for array, x in zip(spec.arrays, call.arrays, strict=True)]
    params = spec.defaults() | {p.name: call.arguments[p.name] for p in spec.params if p.name in call.arguments}
    rows = dispatch.marshaller(spec.name).rows(call.arrays)
    planner = device.planner(rows=rows, **{name: call.arguments[name] for name in spec.runtime})
    device.run(impl.launches(views, params, planner))
    return {a.name: None if v is None else device.get(v) for a, v in zip(spec.arrays, views, strict=True)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_launches_match_the_reference(spec: registry.OpSpec, dtype: str, full_matrix: bool) -> None:
    if dtype == "bfloat16" and not any(a.dtype == "T" for a in spec.arrays):
        pytest.skip("the op has no float arrays")
    for number, call in enumerate(calls(spec, full_matrix)):
        wrong, first = "untried", call
        for k in range(1, checks.DRAWS + 1):
            coarse = coarser(call) if dtype == "bfloat16" else call
            wrong = checks.compare(coarse, run(coarse, dtype, LAYOUTS[number % len(LAYOUTS)], Interpreted()))
            if wrong is None or call.redraw is None or not checks.is_ill_conditioned(call):
                break
            call = replace(call.redraw(k), redraw=call.redraw)
        assert wrong is None, f"{dtype}: {first}: {wrong}"


#: Columns that a row's threads take by shuffles, by shared memory, with two eights each, and by walking on.
LONG = (250, 264, 2040, 4090, 4104, 6150)
OVER_ROWS = [s for s in SPECS if not s.column_local and {"N,C"} & {a.shape for a in s.outputs}]


@pytest.mark.parametrize("cols", LONG)
@pytest.mark.parametrize("spec", OVER_ROWS, ids=lambda spec: spec.name)
def test_rows_of_any_length(spec: registry.OpSpec, cols: int) -> None:
    for variant in spec.variants:
        sizes = dict.fromkeys(spec.letters, 3) | {"C": cols}
        call = cases.draw(spec, cases.rng(cols), sizes, np.dtype(np.float32), variant)
        if call is not None:
            wrong = checks.compare(call, run(call, "float32", LAYOUTS[cols % 3], Interpreted()))
            assert wrong is None, f"{variant}: {wrong}"


def coarser(call: cases.Call) -> cases.Call:
    """The call with inputs of bfloat16, and results that are rounded once more, to 8 bits."""
    pairs = zip(call.spec.arrays, call.arrays, strict=True)
    arrays = tuple(rounded(x) if x is not None and a.dtype == "T" and a.role != "out" else x for a, x in pairs)
    fine = call.spec.tolerances

    def tolerance(sizes: Mapping[str, int]) -> dict[str, registry.Tolerance]:
        return {name: replace(one, ulp=one.ulp + 2.0**15) for name, one in fine(sizes).items()}

    exact = all(one.exact for one in fine(call.sizes).values())
    spec = call.spec if exact else replace(call.spec, tolerance=tolerance)
    found = replace(call, spec=spec, arrays=arrays)
    if exact:
        pairs = zip(call.spec.arrays, found.reference(np.float32), strict=True)
        found.__dict__["want"] = [rounded(x) if x is not None and stored_as(a, "bfloat16") else x for a, x in pairs]
    return found


def test_every_op_has_launches() -> None:
    missing = [spec.name for spec in registry.specs() if not registry.find(spec.name, "cuda") and not spec.on_host]
    assert not missing


# ---------------------------------------------------------------------------------------------- machine code
def launched(spec: registry.OpSpec, dtype: str) -> list[Launch]:
    """The launches of each variant of an op on a matrix that every path fits."""
    device, found = Interpreted(), {}
    for variant in spec.variants:
        call = cases.draw(spec, cases.rng(0), dict.fromkeys(spec.letters, 64), np.dtype(np.float32), variant)
        if call is None:
            continue
        views = [device.put(x, stored_as(a, dtype)) for a, x in zip(spec.arrays, call.arrays, strict=True)]
        params = {**spec.defaults(), **variant}
        for launch in registry.find(spec.name, "cuda").launches(views, params, device.planner(rows=64)):
            found[launch.kernel.name] = launch
    return list(found.values())


def check(kernel: Kernel, dtype: str, cc: tuple[int, int]) -> None:
    code, report = numba_cuda.cubin(kernel, dtype, cc)
    assert len(code) > 1000
    for what in ("bytes stack frame", "bytes spill stores", "bytes spill loads"):
        (found,) = re.findall(rf"(\d+) {what}", report)
        assert found == "0", f"{kernel.name}: {found} {what}"
    (registers,) = re.findall(r"Used (\d+) registers", report)
    assert int(registers) <= kernel.registers, f"{kernel.name} uses {registers} registers of {kernel.registers}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_machine_code(spec: registry.OpSpec, dtype: str, full_matrix: bool) -> None:
    """No stack, no spills, registers within the budget, no float64 unless the kernel says why."""
    for launch in launched(spec, dtype):
        for cc in numba_cuda.ARCHITECTURES if full_matrix else ((9, 0),):
            check(launch.kernel, launch.dtype, cc)
        text = numba_cuda.ptx(launch.kernel, launch.dtype)
        if not launch.kernel.doubles:
            assert not re.search(r"^\s*(?!mov|\.reg)\S*\.f64", text, re.MULTILINE), f"{launch.kernel.name}: float64"


def test_machine_code_of_what_nets_launch(full_matrix: bool) -> None:
    """Kernels that no call of one op launches: fused ones, one activation's of each family in a run without --full."""
    alone = {launch.kernel.name for spec in SPECS for launch in launched(spec, "float32")}
    fused = [k for k in ahead.kernels() if k.name not in alone]
    assert len(fused) > 60
    for kernel in fused if full_matrix else [k for k in fused if re.search("_relu(_|$)|round|next", k.name)]:
        for dtype in ("float32", "bfloat16"):
            check(kernel, dtype, (9, 0))


#: Ops whose arrays are all matrices (N, C), or all vectors (P,) but for a factor.
SWEEPS = [
    spec
    for spec in SPECS
    if {a.shape for a in spec.arrays if a.dtype == "T"} in ({"N,C"}, {"P"})
    and (spec.column_local or "lr" in spec.runtime)
]


READ, WRITTEN = ("in", "inout"), ("out", "inout")


def _floats(kernel: Kernel) -> list[int]:
    """Positions of the pointers to floats among a kernel's arguments."""
    return [k for k, (kind, _) in enumerate(kernel.arguments) if kind == "T*"]


def wide_accesses(launch: Launch) -> tuple[int, int]:
    """Loads and stores of 16 bytes in device memory."""
    text = numba_cuda.ptx(launch.kernel, launch.dtype)
    return tuple(len(re.findall(rf"\b{way}\.global(?:\.\w+)*\.v4", text)) for way in ("ld", "st"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SWEEPS, ids=lambda spec: spec.name)
def test_sweeps_access_16_bytes_at_a_time(spec: registry.OpSpec, dtype: str) -> None:
    """Eight elements of each input and output, once for each group of parameters."""
    groups = 2 if "lr" in spec.runtime else 1
    for launch in launched(spec, dtype):
        text = numba_cuda.ptx(launch.kernel, launch.dtype)
        eights = groups * (2 if dtype == "float32" else 1)
        reads, writes = (sum(a.role in roles for a in spec.arrays if a.dtype == "T") for roles in (READ, WRITTEN))
        loads, stores = wide_accesses(launch)
        copies = sum(kind == "u2*" for kind, _ in launch.kernel.arguments)  # eight bfloat16 are 16 bytes
        assert stores == writes * eights + copies, launch.kernel.name
        unread = sum(not re.search(rf"\bld\.param\.u64[^;]*_param_{k}\]", text) for k in _floats(launch.kernel))
        assert loads == (reads - unread) * eights, launch.kernel.name  # the gradient of y = x does not look at y


#: Eights of matrices that the text of a kernel loads and stores 16 bytes at a time, by its name. Statistics read
#: a row, then two rows in flight for each sum; softmax and its loss keep two eights of a row and walk the rest again.
EIGHTS = {
    "prelu_forward": (1, 1),
    "prelu_backward": (2, 1),
    "softmax_forward": (4, 3),
    "softmax_backward": (8, 3),
    "batchnorm_statistics": (6, 0),
    "batchnorm_apply": (1, 1),
    "batchnorm_inference": (1, 1),
    "batchnorm_fold": (0, 1),
    "batchnorm_sums": (7, 0),
    "batchnorm_dx": (2, 1),
    "softmax_cross_entropy": (4, 3),
    "softmax_cross_entropy_onehot": (4, 3),  # targets are float32 beside bfloat16
    "binary_cross_entropy": (1, 1),
    "mse": (1, 1),
    "squared_norm": (1, 0),
    "gather_rows": (1, 1),
    "dense_forward": (4, None),  # stores: one for each of a thread's rows, as often as the compiler copies its loop
    "dense_backward_input": (4, None),
    "dense_backward_weights": (4, None),
}
#: One thread for one number: indices, labels, weights, masks as bytes, draws.
NARROW = {"dropout_mask", "clip_scale", "epoch_indices", "gather_labels", "gather_values", "row_range", "philox4x32"}


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in SWEEPS], ids=lambda spec: spec.name)
def test_other_kernels_access_16_bytes_at_a_time(spec: registry.OpSpec) -> None:
    """A float32 eight takes two accesses, a bfloat16 one takes one: the difference counts those of matrices."""
    if spec.name in NARROW:
        assert all(not wide_accesses(launch)[0] for launch in launched(spec, "float32"))
        return
    for single, half in zip(launched(spec, "float32"), launched(spec, "bfloat16"), strict=True):
        name = max((n for n in EIGHTS if single.kernel.name.startswith(n)), key=len)
        (loads, stores), (half_loads, half_stores) = wide_accesses(single), wide_accesses(half)
        expected = EIGHTS[name]
        assert loads - half_loads == expected[0], single.kernel.name
        assert half_loads >= expected[0], single.kernel.name
        if expected[1] is None:
            assert stores >= half_stores >= 2, single.kernel.name
        else:
            assert stores - half_stores == expected[1], single.kernel.name


def test_cubins_are_built_ahead_and_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ahead.kernels()
    names = {kernel.name for kernel in kernels}
    assert len(names) == len(kernels) > 200
    assert names >= {launch.kernel.name for spec in SPECS for launch in launched(spec, "float32")}
    assert names >= {"round_parameters", "round_forward", "widen_forward", "gather_rows_rounded", "bias_relu_dropout"}
    (relu,) = (kernel for kernel in kernels if kernel.name == "relu_forward")
    (count,) = (kernel for kernel in kernels if kernel.name == "row_range")
    assert cubins.build([relu, count], [(8, 0)], tmp_path) == 3  # one of them has no floats
    monkeypatch.setattr(cubins, "PACKED", tmp_path)
    assert cubins.code(relu, "bfloat16", (8, 6)) == cubins.packed(relu, "bfloat16", (8, 0))
    assert cubins.packed(relu, "bfloat16", (9, 0)) is None
    assert cubins.code(relu, "bfloat16", (8, 0))[1:4] == b"ELF"


def test_the_suite_for_a_gpu_plans_its_cases() -> None:
    suite = pytest.importorskip("bench.gpu_suite", reason="the bench folder is not beside the tests")
    for op in suite.SHARES:
        launches, sizes, absent = suite._case(op, 64, 48, "float32", Interpreted())
        assert launches
        assert registry.spec(op).moved(sizes, 4, absent) > 0
