"""Dense calls as products of cuBLASLt, where the library is present.

| call | epilogue | what is left for one sweep (``kernels/dense/sweeps_cuda.py``) |
|---|---|---|
| forward | bias; ReLU, with a bit for each positive element where backward wants them; GELU by tanh | others, dropout |
| backward to the input | the bits, or GELU's derivative | others, dropout |
| backward to the weights | sums of dy: db | |

An epilogue that the library does not have for the types or shapes at hand becomes a sweep, a product that it does not
have a kernel of our own (``kernels/dense/numba_cuda.py``). It says which it has by its heuristic; nothing is timed, so
a net takes the same way in every run. Products work on the rows that are there: a smaller batch has another plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastdl.kernels import registry
from fastdl.kernels.common.gpu import Launch, Planner, Product, View
from fastdl.kernels.dense.sweeps_cuda import backward_launch, forward_launch
from fastdl.kernels.optimizers.numba_cuda import round_launch
from fastdl.program import Buffer, Call

#: Bits of a mask's row start at multiples of four words (cuBLASLt: 128 bits).
WORDS = 4
#: Values before GELU have so many elements, or a multiple, between rows.
VALUES = 8


class Products:
    """The products of one plan; masks are remembered from forward to backward.

    Parameters
    ----------
    groups : sequence of lists of Call
        The whole plan: a forward product writes a mask only for a backward one that reads it.
    views : Views
    planner : Planner
    """

    def __init__(self, groups: Sequence[Sequence[Call]], views: Any, planner: Planner) -> None:
        self._views, self._planner = views, planner
        self._masks: dict[Buffer, View] = {}
        self._readers = {rest[0].buffers["y"]: head for head, *rest in groups if _undoes_relu(head, rest)}

    def launches(self, group: Sequence[Call]) -> list[Launch | Product] | None:
        """The launches of a dense call and its tails, or None where the library has no such product."""
        head, *rest = group
        make = {
            "dense_forward": self._forward,
            "dense_backward_input": self._backward_input,
            "dense_backward_weights": self._backward_weights,
        }[head.op]
        found = make(head, rest)
        return found if all(self._has(launch) for launch in found) else None

    # ------------------------------------------------------------------ the three products
    def _forward(self, head: Call, rest: Sequence[Call]) -> list[Launch | Product]:
        x, w, b, y, z = self._arrays(head)
        activation = head.params.get("activation") or "identity"
        bias, before = self._bias(head, b, y)
        added = {"epilogue": "BIAS", "vector": bias} if b is not None else {}
        if not rest and (fused := self._fused(head, activation, Product(x, w, y, **added), z)):
            return before + fused
        self._masks.pop(head.buffers["y"], None)
        out = self._views.view(rest[-1].buffers["y"]) if rest else y
        dropout = rest[-1].params if rest else None
        alpha = head.params.get("alpha", 0.0)
        if z is not None:
            sweep = forward_launch(z, None, out, activation, alpha, dropout, self._planner)
            return [*before, Product(x, w, z, **added), sweep]
        return [Product(x, w, y), forward_launch(y, b, out, activation, alpha, dropout, self._planner)]

    def _fused(self, head: Call, activation: str, plain: Product, z: View | None) -> list[Launch | Product]:
        """The product with the activation in its epilogue, where the library has it."""
        found = None
        if activation == "relu" and plain.vector is not None and z is None:
            found = replace(plain, epilogue="RELU_BIAS")
            if (mask := self._mask(head, plain.c)) is not None:
                found = replace(plain, epilogue="RELU_AUX_BIAS", aux=mask)
        elif activation == "gelu_tanh" and plain.vector is not None and z is not None and z.row_stride % VALUES == 0:
            found = replace(plain, epilogue="GELU_AUX_BIAS", aux=z)
        elif activation == "identity" and z is None:
            found = plain
        return [found] if found is not None and self._has(found) else []

    def _backward_input(self, head: Call, rest: Sequence[Call]) -> list[Launch | Product]:
        dy, w, dx = self._arrays(head)
        product = Product(dy, w, dx, b_turned=True)
        if not rest or rest[-1].op == "dropout_backward":
            return [product, *self._tails(rest)]
        undone = rest[-1]
        saved = undone.buffers.get("y") or undone.buffers.get("x")
        out, kept = self._views.view(undone.buffers["dx"]), self._views.view(saved)
        if len(rest) == 1 and undone.op == "relu_backward" and saved in self._masks:
            return [replace(product, c=out, epilogue="DRELU", aux=self._masks[saved])]
        if len(rest) == 1 and undone.op == "gelu_tanh_backward" and dx.cols % VALUES == 0:
            fused = replace(product, c=out, epilogue="DGELU", aux=kept)
            if self._has(fused):
                return [fused]
        if len(rest) == 1:
            return [product, *self._tails(rest)]
        name, alpha = undone.op.removesuffix("_backward"), undone.params.get("alpha", 0.0)
        return [product, backward_launch(dx, kept, out, name, alpha, rest[0].params, self._planner)]

    def _backward_weights(self, head: Call, rest: Sequence[Call]) -> list[Launch | Product]:
        x, dy, dw, db = self._arrays(head)
        return [Product(x, dy, dw, a_turned=True, epilogue="DEFAULT" if db is None else "BGRADA", vector=db)]

    # ------------------------------------------------------------------ pieces
    def _arrays(self, call: Call) -> list[View | None]:
        pairs = zip(call.arrays(), call.spec.arrays, strict=True)
        return [None if b is None else self._views.view(b, array) for b, array in pairs]

    def _has(self, launch: Launch | Product) -> bool:
        return isinstance(launch, Launch) or self._planner.library.has(launch)

    def _mask(self, head: Call, y: View) -> View | None:
        """Room for the bits of ReLU, where the backward product that reads them can be had too."""
        reader = self._readers.get(head.buffers["y"])
        if reader is None:
            return None
        words = -(-y.cols // (32 * WORDS)) * WORDS
        mask = self._planner.scratch(y.rows, words, dtype=np.uint32)
        dy, w, _ = self._arrays(reader)
        if not self._has(Product(dy, w, y, b_turned=True, epilogue="DRELU", aux=mask)):
            return None
        self._masks[head.buffers["y"]] = mask
        return mask

    def _bias(self, head: Call, b: View | None, y: View) -> tuple[View | None, list[Launch]]:
        """A bias as products take it; a folded one of bfloat16, which no optimiser rounds, by a launch of its own."""
        if b is None or y.dtype != "bfloat16":
            return b, []
        if (kept := self._views.rounded(head.buffers["b"])) is not None:
            return kept, []
        copy = View(self._planner.allocate(2 * b.rows), b.shape, 1, "bfloat16", b.name)
        return copy, [round_launch(b, copy)]

    def _tails(self, calls: Sequence[Call]) -> list[Launch]:
        """What our own product would do in its registers."""
        found = []
        for call in calls:
            params = {**call.spec.defaults(), **call.params}
            found += registry.find(call.op, "cuda").launches(self._arrays(call), params, self._planner)
        return found


def _undoes_relu(head: Call, rest: Sequence[Call]) -> bool:
    return head.op == "dense_backward_input" and [call.op for call in rest] == ["relu_backward"]
