"""onnxruntime: inference of a net whose batch norm is folded into its dense layers, as an exporter leaves it."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bench.cases import NETS, Net
from bench.peers.data import normal
from bench.peers.worker import Work


def _graph(net: Net) -> bytes:
    nodes, tensors, at = [], [], "x"
    last = len(net.widths) - 2
    for k, (n, o) in enumerate(zip(net.widths[:-1], net.widths[1:], strict=True)):
        tensors += [
            numpy_helper.from_array(normal(n, o) / np.float32(n**0.5), f"w{k}"),
            numpy_helper.from_array(normal(o), f"b{k}"),
        ]
        nodes.append(helper.make_node("Gemm", [at, f"w{k}", f"b{k}"], [f"z{k}"]))
        at = f"z{k}"
        if k < last:
            nodes.append(helper.make_node("Relu", [at], [f"h{k}"]))
            at = f"h{k}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", net.widths[0]])
    y = helper.make_tensor_value_info(at, TensorProto.FLOAT, ["N", net.widths[-1]])
    graph = helper.make_graph(nodes, net.name, [x], [y], tensors)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def predict(net: str, rows: int, threads: int, variant: str) -> Work:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(_graph(NETS[net]), options, providers=["CPUExecutionProvider"])
    x = normal(rows, NETS[net].widths[0])
    return Work(lambda: session.run(None, {"x": x}))
