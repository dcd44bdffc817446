"""PyTorch on the CPU: eager, and compiled under the name ``torch_compile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import NETS, Net
from bench.peers.data import RATE, batch, labels, normal
from bench.peers.worker import Missing, Work


def _model(net: Net, plain: bool = False) -> torch.nn.Sequential:
    parts: list[torch.nn.Module] = []
    for n, o in zip(net.widths[:-2], net.widths[1:-1], strict=True):
        if plain:
            parts += [torch.nn.Linear(n, o), torch.nn.ReLU()]
        else:
            norm = torch.nn.BatchNorm1d(o)
            parts += [torch.nn.Linear(n, o, bias=False), norm, torch.nn.ReLU(), torch.nn.Dropout(net.rate)]
    return torch.nn.Sequential(*parts, torch.nn.Linear(*net.widths[-2:]))


def step(net: str, entry: str, threads: int, variant: str, plain: bool = False, mixed: bool = False) -> Work:
    torch.set_num_threads(threads)
    found = NETS[net]
    model = _model(found, plain)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)  # the fastest of its three on the CPU
    X, y = (torch.from_numpy(a) for a in batch(found))

    def forward(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return F.cross_entropy(model(x), targets)

    run = torch.compile(forward) if variant == "compile" else forward

    def body() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = run(X, y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Work(body)


def op(op: str, rows: int, cols: int, threads: int, variant: str) -> Work:
    torch.set_num_threads(threads)
    x, out = torch.from_numpy(normal(rows, cols)), torch.empty(rows, cols)
    aten = torch.ops.aten
    if op == "softmax_cross_entropy":
        z, targets = x.requires_grad_(), torch.from_numpy(labels(rows, cols))
        return Work(lambda: torch.autograd.grad(F.cross_entropy(z, targets), z))
    if op.startswith("batchnorm"):
        gamma, beta, mean, var = torch.ones(cols), torch.zeros(cols), torch.zeros(cols), torch.ones(cols)
        if op == "batchnorm_forward":
            return _quiet(lambda: F.batch_norm(x, mean, var, gamma, beta, True, 0.1, 1e-5))
        _, saved_mean, saved_invstd = aten.native_batch_norm(x, gamma, beta, mean, var, True, 0.1, 1e-5)
        dy = torch.from_numpy(normal(rows, cols, seed=3))
        return _quiet(
            lambda: aten.native_batch_norm_backward(
                dy, x, gamma, mean, var, saved_mean, saved_invstd, True, 1e-5, [True, True, True]
            )
        )
    if op == "adam_step":
        w = torch.nn.Parameter(x.reshape(-1).clone())
        w.grad = torch.from_numpy(normal(rows * cols, seed=3))
        return Work(torch.optim.Adam([w], 1e-3, fused=True).step)
    calls: dict[str, Any] = {
        "dropout_forward": lambda: F.dropout(x, RATE, True),
        "relu_forward": lambda: torch.clamp_min(x, 0.0, out=out),
        "elu_forward": lambda: torch._C._nn.elu(x, out=out),
        "sigmoid_forward": lambda: torch.sigmoid(x, out=out),
        "tanh_forward": lambda: torch.tanh(x, out=out),
        "softplus_forward": lambda: torch._C._nn.softplus(x, out=out),
        "gelu_forward": lambda: torch._C._nn.gelu(x, out=out),
    }
    if op not in calls:
        raise Missing(f"no {op}")
    return _quiet(calls[op])


def _quiet(call: Any) -> Work:
    def body() -> Any:
        with torch.inference_mode():
            return call()

    return Work(body)


def linear(shape: Sequence[int], threads: int, variant: str, mixed: bool = False) -> Work:
    torch.set_num_threads(threads)
    n, i, o = shape
    x, w, b = torch.from_numpy(normal(n, i)), torch.from_numpy(normal(o, i)), torch.from_numpy(normal(o))
    if mixed:
        x, w, b = x.bfloat16(), w.bfloat16(), b.bfloat16()
        return _quiet(lambda: F.linear(x, w, b))
    return _quiet(lambda: torch.relu_(F.linear(x, w, b)))


def predict(net: str, rows: int, threads: int, variant: str) -> Work:
    torch.set_num_threads(threads)
    model = _model(NETS[net]).eval()
    x = torch.from_numpy(normal(rows, NETS[net].widths[0]))
    return _quiet(lambda: model(x))
