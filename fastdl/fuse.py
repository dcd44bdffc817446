"""Fusion: a small rewrite on the call list. Each rule is one function from Program to Program.

========================  ==========================================================================================
rule                      what it does
========================  ==========================================================================================
batchnorm_fold            dense, batchnorm by running statistics -> dense with weights that do both, made anew when the
                          parameters have changed
batchnorm_chain           batchnorm, activation, dropout -> one batchnorm call, forward and backward
dense_activation          dense, activation -> one dense call with the activation as its epilogue
relu_dropout              backward of relu reads what dropout after it has left: its sign is both masks, nobody needs
                          relu's own output
tails                     a column-local call after a dense product runs on each finished panel of it, in cache
                          (back ends that work on panels)
epilogues                 dropout after a dense product, and backward the gradients of dropout and activation before
                          one, run in the registers of that product (CUDA)
========================  ==========================================================================================

A fused Program computes what the plain one does: masks bit for bit, floats within the ops' tolerances (tested).
"""

from __future__ import annotations

from dataclasses import replace

from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.program import FOLD, Buffer, Call, Program

FORWARD, BACKWARD = "_forward", "_backward"


def fuse(program: Program, panels: bool, registers: bool = False) -> Program:
    """Apply every rule that the back end can run."""
    program = relu_dropout(dense_activation(batchnorm_chain(batchnorm_fold(program))))
    if registers:
        return epilogues(program)
    return tails(program) if panels else program


def _activation(call: Call) -> str | None:
    """Name of the element-wise activation that a forward call computes."""
    name = call.op.removesuffix(FORWARD)
    return name if call.op.endswith(FORWARD) and name in ACTIVATIONS and not ACTIVATIONS[name].row_op else None


def _only_reader(program: Program, buffer: Buffer, phase: str) -> Call | None:
    """The call that reads a buffer in a phase, when it is the only one."""
    readers = [c for c in program.readers(buffer) if c.phase == phase]
    return readers[0] if len(readers) == 1 else None


def _backward_of(program: Program, call: Call) -> Call | None:
    """The element-wise backward call that belongs to a forward call."""
    x = call.buffers["x"]
    op = call.op.removesuffix(FORWARD) + BACKWARD
    for candidate in program.calls:
        if candidate.op == op and any(b.name == f"d {x.name}" for b in candidate.writes):
            return candidate
    return None


def _substitute(program: Program, swaps: dict[Call, Call | None]) -> Program:
    calls = [swaps.get(c, c) for c in program.calls]
    return program.replaced([c for c in calls if c is not None])


# ---------------------------------------------------------------------------------------------- folded batchnorm
def batchnorm_fold(program: Program) -> Program:
    """Let the dense product before each normalisation by running statistics do its work.

    The normalisation is w' = w gain, b' = (b - mean) gain + beta for all rows alike. Training Programs normalise by the
    batch, so there the rule finds nothing.
    """
    folds = []
    for norm in [c for c in program.calls if c.op == "batchnorm_inference"]:
        z = norm.buffers["x"]
        dense = next((c for c in program.writers(z) if c.op == "dense_forward"), None)
        if dense is None or program.readers(z) != [norm]:
            continue
        name = norm.buffers["gamma"].name.removesuffix("/gamma")
        w = Buffer(f"{name}/folded kernel", dense.buffers["w"].shape, "folded")
        b = Buffer(f"{name}/folded bias", z.shape, "folded")
        vectors = {key: norm.buffers[key] for key in ("gamma", "beta", "running_mean", "running_var")}
        given = {"w": dense.buffers["w"], "b": dense.buffers.get("b")}
        made = {"w_folded": w, "b_folded": b}
        folds.append(Call("batchnorm_fold", {**given, **vectors, **made}, dict(norm.params), FOLD))
        buffers = {**dense.buffers, "w": w, "b": b, "y": norm.buffers["y"]}
        program = _substitute(program, {dense: replace(dense, buffers=buffers), norm: None})
    return program.replaced([*folds, *program.calls])


# ---------------------------------------------------------------------------------------------- batchnorm chain
def batchnorm_chain(program: Program) -> Program:
    """Absorb the activation and the dropout after each batch normalisation."""
    for norm in [c for c in program.calls if c.op in ("batchnorm_forward", "batchnorm_inference")]:
        absorbed: list[Call] = []
        params, slope, y = dict(norm.params), None, norm.buffers["y"]
        after = _only_reader(program, y, "forward")
        if after is not None and (name := _activation(after)):
            absorbed.append(after)
            params |= {"activation": name, **after.params}
            slope, y = after.buffers.get("slope"), after.buffers["y"]
            after = _only_reader(program, y, "forward")
        if after is not None and after.op == "dropout_forward" and norm.op == "batchnorm_forward":
            absorbed.append(after)
            params |= after.params
            y = after.buffers["y"]
        if absorbed:
            program = _absorb(program, norm, absorbed, params, slope, y)
    return program


def _absorb(
    program: Program, norm: Call, absorbed: list[Call], params: dict, slope: Buffer | None, y: Buffer
) -> Program:
    swaps: dict[Call, Call | None] = dict.fromkeys(absorbed)
    swaps[norm] = replace(norm, buffers={**norm.buffers, "y": y, "slope": slope}, params=params)
    backward = next(
        (c for c in program.calls if c.op == "batchnorm_backward" and c.buffers["x"] is norm.buffers["x"]), None
    )
    if backward is not None:
        chain = [_backward_of(program, c) for c in absorbed]
        if None in chain:
            return program
        swaps.update(dict.fromkeys(chain))
        buffers = {**backward.buffers, "dy": chain[-1].buffers["dy"], "slope": slope}
        if params.get("activation") == "relu":
            buffers["y"] = y  # its sign is both masks
        buffers["dslope"] = next((c.buffers["dslope"] for c in chain if c.buffers.get("dslope")), None)
        names = {p.name for p in backward.spec.params}
        swaps[backward] = replace(
            backward, buffers=buffers, params={k: v for k, v in params.items() if k in names} | backward.params
        )
    return _substitute(program, swaps)


# ---------------------------------------------------------------------------------------------- dense + activation
def dense_activation(program: Program) -> Program:
    """Let the dense product apply the activation; the pre-activation is stored only where backward reads it."""
    for dense in [c for c in program.calls if c.op == "dense_forward"]:
        after = _only_reader(program, dense.buffers["y"], "forward")
        name = _activation(after) if after is not None else None
        if name in (None, "identity", "prelu") or dense.params.get("activation", "identity") != "identity":
            continue
        z = dense.buffers["y"]
        keep = any(z in c.reads for c in program.calls if c is not after)
        fused = replace(
            dense,
            buffers={**dense.buffers, "y": after.buffers["y"], "z": z if keep else None},
            params={**dense.params, "activation": name, **after.params},
        )
        program = _substitute(program, {dense: fused, after: None})
    return program


# ---------------------------------------------------------------------------------------------- relu + dropout
def relu_dropout(program: Program) -> Program:
    """Let relu's gradient take its mask from the output of the dropout that follows.

    Where dropout has put a zero, the gradient that comes through it is one already; elsewhere its positive scale leaves
    the sign alone.
    """
    swaps: dict[Call, Call | None] = {}
    for back in [c for c in program.calls if c.op == "relu_backward"]:
        y = back.buffers["y"]
        drop = _only_reader(program, y, "forward")
        undone = program.writers(back.buffers["dy"])
        if drop is None or drop.op != "dropout_forward" or [c.op for c in undone] != ["dropout_backward"]:
            continue
        if undone[0].params == drop.params and set(program.readers(y)) == {drop, back}:
            swaps[back] = replace(back, buffers={**back.buffers, "y": drop.buffers["y"]})
    return _substitute(program, swaps)


# ---------------------------------------------------------------------------------------------- tails
#: Dense products that finish whole output panels.
HEADS = ("dense_forward", "dense_backward_input")


def tails(program: Program) -> Program:
    """Chain column-local calls to the dense product before them.

    Backward, the product that gives dX and the weight gradient of the same layer are independent; the first runs first,
    so that its tail follows it directly.
    """
    calls = _inputs_first(list(program.calls))
    out: list[Call] = []
    produced: set[Buffer] = set()  # buffers finished panel by panel in the current chain
    for call in calls:
        head = call.op in HEADS
        local = call.spec.column_local and not head
        if local and any(b in produced for b in call.reads) and out[-1].phase == call.phase:
            out.append(replace(call, tail=True))
            produced |= set(call.writes)
        else:
            out.append(call)
            produced = set(call.writes) if head else set()
    return program.replaced(out)


def _inputs_first(calls: list[Call]) -> list[Call]:
    """Move each weight-gradient call behind the column-local calls that follow its layer's dX."""
    out = list(calls)
    k = 0
    while k < len(out):
        if out[k].op == "dense_backward_weights":
            j = k
            while j + 1 < len(out) and out[j + 1].spec.column_local and out[j + 1].phase == "backward":
                out[j], out[j + 1] = out[j + 1], out[j]
                j += 1
            k = max(j, k)
        k += 1
    return out


# ---------------------------------------------------------------------------------------------- epilogues
def epilogues(program: Program) -> Program:
    """Move element-wise calls behind the dense product whose result they alone read.

    Forward that is dropout; backward dropout's gradient and then the activation's, the layer below in reverse.
    """
    following: dict[Call, list[Call]] = {}
    for head in program.calls:
        if head.op == "dense_forward":
            absorbed = _chain(program, head, "y", [lambda c: c.op == "dropout_forward"])
        elif head.op == "dense_backward_input":
            absorbed = _chain(program, head, "dx", [lambda c: c.op == "dropout_backward", _is_gradient])
        else:
            continue
        if absorbed:
            following[head] = absorbed
    moved = {call for chain in following.values() for call in chain}
    calls = []
    for call in program.calls:
        if call not in moved:
            calls += [call, *(replace(c, tail=True) for c in following.get(call, ()))]
    return program.replaced(calls)


def _is_gradient(call: Call) -> bool:
    """Whether a call is the backward of an element-wise activation without slopes."""
    name = call.op.removesuffix(BACKWARD)
    return call.op.endswith(BACKWARD) and name in ACTIVATIONS and name != "prelu" and not ACTIVATIONS[name].row_op


def _chain(program: Program, head: Call, output: str, kinds: list) -> list[Call]:
    """Calls of these kinds, each at most once and in this order, that alone read what the one before wrote."""
    chain, buffer = [], head.buffers[output]
    for is_next in kinds:
        after = _only_reader(program, buffer, head.phase)
        if after is None or len(program.readers(buffer)) != 1 or not is_next(after):
            continue
        chain.append(after)
        buffer = after.writes[0]
    return chain
