"""Everything that only a GPU shows, in one command and within a budget of seconds; no network.

``python bench/gpu_suite.py --budget 540 --out DIR``

Each phase is a process of its own with a limit of its own; what it finds is written at once to ``DIR``, and a table is
printed last. The exit status is that of the phase ``correctness``. Without a GPU every line reads "not measured", with
the reason. A source tree that is not built is built first, with what the machine has.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

Result = dict[str, Any]
#: (rows, columns) of the bandwidth table: 2 GB and more in float32 with input and output.
LARGE = (65536, 4096)
#: (name, layers, width, batch) of the training steps; the bars are those of the peers' ratios, in bfloat16 with float32
#: parameters on both sides.
STEPS = (
    ("4 x 256, batch 1024", 4, 256, 1024, {"eager": 12.0, "compiled": 5.0, "graphed": 1.8}),
    ("4 x 1024, batch 1024", 4, 1024, 1024, {"eager": 3.5, "compiled": 1.8, "graphed": 1.3}),
    ("4 x 8192, batch 8192", 4, 8192, 8192, {}),
)
#: Least share of the copy's bandwidth.
SHARES = {
    "relu_forward": 0.95,
    "relu_backward": 0.95,
    "dropout_forward": 0.95,
    "batchnorm_forward": 0.92,
    "softmax_cross_entropy": 0.92,
    "adam_step": 0.94,
}


# ---------------------------------------------------------------------------------------------- phases
def facts() -> Iterator[Result]:
    """Device, driver, versions, clocks."""
    from fastdl.kernels.common import driver

    gpu = driver.current()
    versions = {}
    for name in ("numpy", "numba", "numba-cuda", "cuda-bindings", "torch", "cupy-cuda13x"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    yield {"what": "versions", "python": platform.python_version(), **versions, "compute capability": gpu.cc}
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,compute_mode"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        yield {"what": "nvidia-smi", **dict(zip(fields.split(","), told.split(", "), strict=False))}
    yield from _epilogues(gpu)


def _epilogues(gpu: Any) -> Iterator[Result]:
    """Which products the library has for 1024 x 1024 x 1024."""
    from fastdl.kernels.common.gpu import EPILOGUES, Product, View
    from fastdl.kernels.dense import cublaslt

    if gpu.library is None:
        yield {"what": "cublaslt", "not measured": cublaslt.missing()}
        return
    size, room = 1024, gpu.allocate(4 << 20)
    for dtype in (np.dtype(np.float32), "bfloat16"):
        matrix, vector = View(room, (size, size), size, dtype), View(room, (size,), 1, dtype)
        bits = View(room, (size, size // 32), size // 32, np.dtype(np.uint32))
        found = {}
        for epilogue in EPILOGUES:
            given = vector if "BIAS" in epilogue or epilogue == "BGRADA" else None
            aux = bits if "RELU" in epilogue else matrix
            aux = aux if "AUX" in epilogue or (epilogue.startswith("D") and epilogue != "DEFAULT") else None
            found[epilogue] = gpu.library.has(Product(matrix, matrix, matrix, epilogue=epilogue, vector=given, aux=aux))
        yield {"what": f"cublaslt {dtype}", **found}


def correctness() -> Iterator[Result]:
    """The contract tests of the back end, whole nets against NumPy, runs that repeat bit for bit, digits."""
    suites = {
        "ops against the reference": ["tests/contract/test_matches_reference.py", "-k", "cuda"],
        "special values, arguments": ["tests/contract/test_special_values.py", "-k", "cuda"],
        "whole steps and epochs": ["tests/cuda/test_training.py", "-k", "not interpreted"],
        "drift and masks": ["tests/api/test_training_drift.py"],
        "products of cuBLASLt": ["tests/cuda/test_cublaslt.py"],
    }
    for name, arguments in suites.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        tail = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:]
        yield {"what": name, "passed": done.returncode == 0, "told": " ".join(tail), "output": done.stdout[-4000:]}
    import fastdl as fd

    X, y = fd.data.load_digits()
    weights = []
    for _ in range(2):
        net = _digits_net(fd)
        net.fit(X[:1437], y[:1437], batch_size=64, epochs=30, verbose=0)
        weights.append(net.get_state())
    accuracy = net.evaluate(X[1437:], y[1437:])["accuracy"]
    same = all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())
    yield {"what": "digits", "passed": accuracy >= 0.97, "accuracy": accuracy}
    yield {"what": "the same seed twice gives the same bits", "passed": same}


def _digits_net(fd: Any) -> Any:
    layers = fd.layers
    stack = [layers.Dense(128, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2)]
    net = fd.Sequential([*stack, layers.Dense(64), layers.ReLU(), layers.Dense(10)], seed=1)
    return net.compile("softmax_cross_entropy", fd.optimizers.Adam(2e-3), backend="cuda")


def ceilings() -> Iterator[Result]:
    """Copy bandwidth, the cost of a launch and of a graph's node, products of the vendor's library."""
    from fastdl.kernels.common import driver

    gpu = driver.current()
    yield {"what": "copy", "bytes per second": _copy(gpu)}
    for nodes in (1, 100):
        graph = gpu.graph(_case("identity_forward", 1, 8, "float32", gpu)[0] * nodes)
        graph.replay(10)
        seconds = min(gpu.seconds(graph, 200) / 200 for _ in range(5))
        yield {"what": f"graph of {nodes} small launches", "seconds": seconds}
    try:
        import torch
    except ImportError:
        yield {"what": "products", "not measured": "torch is absent"}
        return
    for size in (1024, 4096, 8192):
        for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
            seconds = _torch_seconds(lambda a=a, b=b: a @ b)
            yield {"what": f"product {name} {size}", "flops per second": 2 * size**3 / seconds}


def bandwidth() -> Iterator[Result]:
    """Memory-bound launches as a share of a copy of the same run; logical bytes."""
    from fastdl.kernels import registry
    from fastdl.kernels.common import driver

    gpu = driver.current()
    for op, bar in SHARES.items():
        for dtype in ("float32", "bfloat16"):
            if op == "adam_step" and dtype == "bfloat16":
                continue
            launches, sizes, absent = _case(op, *LARGE, dtype, gpu)
            moved = registry.spec(op).moved(sizes, 4 if dtype == "float32" else 2, absent)
            graph = gpu.graph(launches)
            graph.replay(3)
            rates = []
            for _ in range(15):  # interleaved: clocks and neighbours move both
                copied = _copy(gpu, repeat=1)
                rates.append(moved / gpu.seconds(graph, 1) / copied)
            yield {"what": op, "dtype": dtype, "share": statistics.median(rates), "bar": bar}


def steps() -> Iterator[Result]:
    """Whole training steps beside PyTorch eager, compiled and as a CUDA graph, with the same types on both sides.

    bfloat16 has float32 parameters (PyTorch: autocast), float32 is without TF32.
    """
    for name, count, width, batch, bars in STEPS:
        for dtype in ("bfloat16", "float32"):
            if dtype == "bfloat16" or width < 8192:
                yield from _steps(f"{name}, {dtype}", count, width, batch, dtype, bars if dtype == "bfloat16" else {})


def _steps(name: str, count: int, width: int, batch: int, dtype: str, bars: dict[str, float]) -> Iterator[Result]:
    import fastdl as fd
    from fastdl.builder import Feed

    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch, width)).astype(np.float32)
    y = rng.integers(0, 10, batch)
    hidden = [layer for _ in range(count - 1) for layer in (fd.layers.Dense(width), fd.layers.ReLU())]
    net = fd.Sequential([*hidden, fd.layers.Dense(10)], seed=1)
    kind = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    net.compile("softmax_cross_entropy", backend="cuda", dtype=kind).build(width)
    net.train_on_batch(X, y)
    bound = net._runtime.working().train(batch, Feed(labels=True))
    graph = bound.executor.graph_of_step()
    graph.replay(5)
    ours = statistics.median(bound.executor.device.seconds(graph, 20) / 20 for _ in range(9))
    yield {"what": name, "library": "fastdl", "seconds": ours}
    if width >= 8192:
        yield {"what": name, **_share_of_rooflines(bound.executor, ours)}
    for library, seconds in _torch_steps(count, width, batch, dtype):
        found = {"what": name, "library": library, "seconds": seconds, "ratio": seconds / ours}
        yield found | ({"bar": bars[library]} if library in bars else {})


def _share_of_rooflines(executor: Any, seconds: float) -> Result:
    """The least time of a step's products and of its optimiser, by rates of the same run, as a share of its time."""
    try:
        import torch
    except ImportError:
        return {"not measured": "torch, whose product is the roofline, is absent"}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / _torch_seconds(lambda: a @ b)
    program, moved = executor.program, 30 * executor.memory.parameters.size  # Adam's 28 bytes and the rounded copy
    least = program.flops() / rate + moved / _copy(executor.device)
    return {"share of rooflines": least / seconds, "bar": 0.93}


def sanitizer() -> Iterator[Result]:
    """compute-sanitizer over a small training run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"what": "compute-sanitizer", "not measured": "the tool is absent"}
        return
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import fastdl as fd; from bench import gpu_suite;"
        "X, y = fd.data.load_digits(); gpu_suite._digits_net(fd).fit(X[:100], y[:100], batch_size=33, verbose=0)"
    )
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        yield {"what": check, "passed": done.returncode == 0, "told": " ".join(lines[-1:])}


#: name -> (phase, share of the budget)
PHASES: dict[str, tuple[Callable[[], Iterator[Result]], float]] = {
    "facts": (facts, 0.04),
    "correctness": (correctness, 0.36),
    "ceilings": (ceilings, 0.08),
    "bandwidth": (bandwidth, 0.14),
    "steps": (steps, 0.26),
    "sanitizer": (sanitizer, 0.12),
}


# ---------------------------------------------------------------------------------------------- measuring
def _copy(gpu: Any, repeat: int = 5) -> float:
    """Bytes read and written a second by the driver's own copy of 1 GB."""
    if "copy" not in _kept:
        _kept["copy"] = gpu.allocate(1 << 30), gpu.allocate(1 << 30)
    source, target = _kept["copy"]
    return max(2 * (1 << 30) / gpu.seconds_of_copy(target, source, 1 << 30) for _ in range(repeat))


_kept: dict[str, Any] = {}


def _case(op: str, rows: int, cols: int, dtype: str, gpu: Any) -> tuple[list[Any], dict[str, int], list[str]]:
    """Launches of an op on a matrix of this size, the sizes of its letters, and the arrays that were left out."""
    from fastdl.kernels import dispatch, registry
    from fastdl.kernels.common.gpu import Planner, View, run_block

    dispatch.load_cuda()
    spec = registry.spec(op)
    sizes = dict.fromkeys(spec.letters, cols) | {"N": rows, "P": rows * cols // 4}
    absent = [a.name for a in spec.arrays if a.optional and a.name not in ("dz", "y")]
    views = []
    for array in spec.arrays:
        if array.name in absent:
            views.append(None)
            continue
        kind = np.dtype(registry.DTYPES[array.dtype] or np.float32)
        stored = dtype if array.dtype == "T" else kind
        shape = array.dims(sizes)
        width = 2 if stored == "bfloat16" else kind.itemsize
        address = gpu.allocate(int(np.prod(shape)) * width)
        views.append(View(address, shape, int(np.prod(shape[1:])), stored, array.name))
    run = View(gpu.allocate(64), (1,), 1, np.dtype(np.uint32))
    gpu.write(run.address, run_block(rows=rows, total_rows=rows, lr=1e-3))
    planner = Planner(run, gpu.allocate)
    return registry.find(op, "cuda").launches(views, spec.defaults(), planner), sizes, absent


def _torch_seconds(call: Callable[[], Any], times: int = 10) -> float:
    import torch

    for _ in range(3):
        call()
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / times)
    return statistics.median(found)


def _torch_steps(count: int, width: int, batch: int, dtype: str) -> Iterator[tuple[str, float]]:
    try:
        import torch
        import torch.nn.functional as F
    except ImportError:
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden = [m for _ in range(count - 1) for m in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(width, 10)).cuda()
    x, y = torch.randn(batch, width, device="cuda"), torch.randint(0, 10, (batch,), device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=True)

    def step(run: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()

    yield "eager", _torch_seconds(lambda: step(model))
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step(model)
    yield "graphed", _torch_seconds(graph.replay)
    compiled = torch.compile(model)
    yield "compiled", _torch_seconds(lambda: step(compiled))


# ---------------------------------------------------------------------------------------------- the suite
def run_phase(name: str, out: pathlib.Path) -> int:
    """One phase in this process; its results are written one by one."""
    passed = True
    for result in PHASES[name][0]():
        with open(out / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        print(line(result), flush=True)
        passed &= result.get("passed", True)
    return 0 if passed else 1


def line(result: Result) -> str:
    hidden = ("what", "output")
    return f"{result['what']}: " + ", ".join(f"{k} {_short(v)}" for k, v in result.items() if k not in hidden)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def built() -> Iterator[Result]:
    """Build the extensions for this Python if they are not there: a copy of the tree is all that is needed."""
    start = time.monotonic()
    here = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    if subprocess.run([sys.executable, "-c", "from fastdl.kernels.engine import _cython"], **here).returncode:
        told = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], **here)
        passed = told.returncode == 0
        yield {"what": "build", "passed": passed, "seconds": time.monotonic() - start, "output": told.stderr[-4000:]}


def missing() -> str | None:
    try:
        from fastdl.kernels.common import driver
    except ImportError as error:
        return str(error)
    return driver.missing()


def _keep(out: pathlib.Path, found: dict[str, list[Result]]) -> None:
    kept = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "results": found}
    (out / "results.json").write_text(json.dumps(kept, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_suite.py", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds for all phases (540)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for results.json and table.txt")
    parser.add_argument("--phase", choices=PHASES, help="run this one alone, in this process")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.phase:
        return run_phase(options.phase, options.out)
    start, statuses = time.monotonic(), {}
    found = {"build": list(built())}
    reason = missing()
    for name, (_, share) in PHASES.items():
        if reason:
            found[name] = [{"what": name, "not measured": reason}]
            continue
        (options.out / f"{name}.jsonl").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--out", str(options.out), "--phase", name]
        limit = min(share * options.budget, options.budget - (time.monotonic() - start))
        try:
            statuses[name] = subprocess.run(command, timeout=max(1, limit), env=os.environ, check=False).returncode
        except subprocess.TimeoutExpired:
            statuses[name] = 124
        path = options.out / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found[name] = [json.loads(text) for text in lines]
        if statuses[name] == 124:
            found[name].append({"what": name, "not measured": f"the rest: out of time after {limit:.0f} s"})
        _keep(options.out, found)  # after each phase: a machine can go away
    _keep(options.out, found)
    table = "\n".join(f"{name:<12} {line(result)}" for name, results in found.items() for result in results)
    (options.out / "table.txt").write_text(table + "\n")
    print(f"\n{table}")
    return statuses.get("correctness", int("not built" in (reason or "")))


if __name__ == "__main__":
    raise SystemExit(main())
