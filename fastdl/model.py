"""`Sequential`: layers, one after the other, trained and run through Programs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdl import checkpoint, config, losses, optimizers
from fastdl.builder import Bound, Builder, Feed
from fastdl.callbacks import Callback
from fastdl.errors import BackendUnavailable, ModelFileError
from fastdl.executor import Memory, Run
from fastdl.inputs import as_matrix, as_weights, split_validation
from fastdl.kernels import dispatch
from fastdl.kernels.registry import BACKENDS
from fastdl.layers.base import Layer, from_config
from fastdl.layers.core import whole_number
from fastdl.parameters import Weights
from fastdl.program import Program
from fastdl.threads import limit_blas
from fastdl.trainer import evaluate_batches, train

#: Rows of one prediction batch: larger ones gain nothing and cost cache.
PREDICT_ROWS = 256
#: Initial values of parameter p draw from the stream of layer id 2**30 + p.
INITIAL_STREAM = 1 << 30
DTYPES = ("float32", "float64")


class Sequential:
    """A stack of layers.

    Parameters
    ----------
    layers : sequence of Layer
    seed : int
        Key of every random stream of the model: initial weights, dropout masks, epoch permutations. 64 bits.

    Examples
    --------
    >>> net = Sequential([layers.Dense(64), layers.BatchNorm(), layers.ReLU(), layers.Dense(10)], seed=42)
    >>> net.compile(loss="softmax_cross_entropy", optimizer="adam")
    >>> history = net.fit(X, y, batch_size=128, epochs=10)
    """

    def __init__(self, layers: Sequence[Layer], seed: int = 0) -> None:
        counts: dict[str, int] = {}
        self.layers: list[tuple[str, Layer]] = []
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"expected layers from fastdl.layers, found {layer!r}")
            number = counts.get(layer.prefix, 0)
            counts[layer.prefix] = number + 1
            self.layers.append((f"{layer.prefix}_{number}", layer))
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: expected an integer in [0, 2**64), found {seed!r}")
        self.seed = seed
        self.step = 0  #: training steps taken
        self.epoch = 0  #: epochs finished
        self.stop_training = False
        self.extra: dict[str, Any] = {}  #: whatever was handed to `save` with the model
        self.loss: losses.Loss | None = None
        self.optimizer: optimizers.Optimizer | None = None
        self.lr = 0.0  #: learning rate in use; assign to change it
        self._asked: dict[str, Any] = {"backend": "auto", "threads": "auto", "dtype": "float32", "fuse": True}
        self._builder: Builder | None = None
        self._memory: Memory | None = None
        self._moments: dict[str, np.ndarray] = {}
        self._bound: dict[tuple[Any, ...], Bound] = {}
        self._backend = ""
        self._last: tuple[Bound, int] | None = None  # of forward(), for backward()
        self._lock = threading.RLock()

    # ------------------------------------------------------------------ set-up
    def compile(
        self,
        loss: str | losses.Loss | None = None,
        optimizer: str | optimizers.Optimizer = "adam",
        backend: str = "auto",
        threads: int | str = "auto",
        dtype: str = "float32",
        fuse: bool = True,
    ) -> Sequential:
        """Choose how to train; returns the model.

        Parameters
        ----------
        loss : {"softmax_cross_entropy", "binary_cross_entropy", "mse"} or Loss
        optimizer : {"sgd", "adam", "adamw"} or Optimizer
        backend : {"auto", "numpy", "numba", "cython"}
        threads : "auto" or int
        dtype : {"float32", "float64"}
        fuse : bool
            False runs the calls as the layers name them.

        Raises
        ------
        ValueError
            For an unknown name; the known ones are listed.
        BackendUnavailable
            When the back end cannot run here; the message says why.
        """
        dtype = np.dtype(dtype).name if not isinstance(dtype, str) else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype: unknown {dtype!r}, known: {', '.join(DTYPES)}")
        if threads != "auto":
            config.check_threads(threads)
        config.check_backend(backend)
        if backend != "auto" and (state := dispatch.load(backend)) != "available":
            raise BackendUnavailable(f"back end {backend!r} is not available: {state}")
        with self._lock:
            self.loss = None if loss is None else losses.get(loss)
            self.optimizer = optimizers.get(optimizer)
            self.lr = self.optimizer.lr
            if dtype != self._asked["dtype"] and self._builder is not None:
                raise ValueError(
                    f"dtype: this model is built with {self._asked['dtype']}, found {dtype}; make a new model"
                )
            self._asked = {"backend": backend, "threads": threads, "dtype": dtype, "fuse": bool(fuse)}
            self._bound.clear()
            self._moments = {}
            self.step = 0
            if self._builder is not None:
                self._place(self._resolve())
        return self

    def build(self, width: int) -> Sequential:
        """Fix the number of input features and draw the initial weights; `fit` and `predict` do it by themselves."""
        with self._lock:
            whole_number(width, "input features")
            if self._builder is None:
                self._builder = Builder(self.layers, width, self.seed, self._asked["dtype"])
                self._place(self._resolve())
                self._draw()
            elif self._builder.width != width:
                raise ValueError(f"expected {self._builder.width} features, as this model was built, found {width}")
        return self

    def _resolve(self) -> str:
        """The back end that runs this model's Programs."""
        name = config.resolve_backend(None, self._asked["backend"])
        if name != "auto":
            if (state := dispatch.load(name)) != "available":
                raise BackendUnavailable(f"back end {name!r} is not available: {state}")
            return name
        for name in BACKENDS:
            if not self._refusals(name):
                return name
        raise BackendUnavailable("no back end can run this model")

    def _refusals(self, name: str) -> list[str]:
        """Why a back end cannot run the model."""
        state = dispatch.load(name)
        if state != "available":
            return [state]
        calls = self._plain_program().calls
        return [found for c in calls if isinstance(found := dispatch.candidate(c.op, name, (), c.params), str)]

    def _plain_program(self) -> Program:
        builder = self._built()
        memory, moments = builder.memory(False, self.optimizer)
        if self.loss is not None:
            feed = Feed(rows=1, labels=self.loss.target_kind == "labels")
            return builder.train(1, feed, self.loss, self.optimizer, memory, moments, False)[0]
        return builder.loop(1, self.optimizer, memory, moments, True, False)[0]

    def _built(self) -> Builder:
        if self._builder is None:
            raise ValueError("the model does not know its input yet: call fit(), predict() or build(features) first")
        return self._builder

    def _compiled(self) -> tuple[losses.Loss, optimizers.Optimizer]:
        if self.loss is None or self.optimizer is None:
            raise ValueError("the model has no loss yet: call compile(loss=..., optimizer=...) first")
        return self.loss, self.optimizer

    def _place(self, backend: str) -> None:
        """Lay the parameters out for a back end; values and optimiser states move along."""
        old, old_moments = self._memory, self._moments
        self._memory, self._moments = self._built().memory(backend == "cython", self.optimizer)
        self._backend = backend
        self._bound.clear()
        self._last = None
        if old is not None:
            for new_arena, old_arena in ((self._memory.parameters, old.parameters), (self._memory.states, old.states)):
                for name in old_arena.offsets:
                    new_arena.write(name, old_arena.read(name))
            for key in set(old_moments) & set(self._moments):
                for name in old.parameters.offsets:
                    value = old.parameters.read(name, old_moments[key])
                    target = self._memory.parameters.view(name, self._moments[key])
                    if hasattr(target, "fill_from"):
                        target.fill_from(value)
                    else:
                        target[...] = value

    def _draw(self) -> None:
        """Initial values: parameter p from its own stream, equal bits on every back end."""
        for arena in (self._memory.parameters, self._memory.states):
            order = list(self._built().segments) + list(self._built().states)
            for segment in arena.segments:
                op, params, value = segment.initializer.call(segment.buffer.shape)
                out = np.full(segment.buffer.shape, value if op is None else 0.0, arena.dtype)
                if op is not None:
                    layer = INITIAL_STREAM + order.index(segment.name)
                    dispatch.run(op, out.reshape(-1), backend=self._backend, seed=self.seed, layer=layer, **params)
                arena.write(segment.name, out)

    def _ready(self, width: int | None = None) -> Builder:
        """Build if needed, and follow a change of the back end (context, environment)."""
        if width is not None:
            self.build(width)
        builder = self._built()
        name = self._resolve_cached()
        if name != self._backend:
            self._place(name)
        return builder

    def _resolve_cached(self) -> str:
        name = config.resolve_backend(None, self._asked["backend"])
        return self._backend if name in ("auto", self._backend) else self._resolve()

    def _threads(self, program: Program) -> tuple[int, str]:
        return config.threads_for(program.flops(), None, self._asked["threads"])

    def _program(self, key: tuple[Any, ...], make: Any) -> Bound:
        """A bound Program by its settings; made when first asked for."""
        threads = config.resolve_threads(None, self._asked["threads"])
        key = (*key, threads)
        found = self._bound.get(key)
        if found is None:
            if len(self._bound) >= 8:  # e.g. growing batches: keep the newest
                self._bound.pop(next(iter(self._bound)))
            made = make()
            found = self._built().bound(made, self._memory, self._backend, self._threads(made[0])[0])
            self._bound[key] = found
        return found

    # ------------------------------------------------------------------ training
    def fit(
        self,
        X: Any,
        y: Any,
        batch_size: int = 32,
        epochs: int = 1,
        validation_data: tuple[Any, ...] | None = None,
        validation_split: float = 0.0,
        sample_weight: Any = None,
        callbacks: Iterable[Callback] = (),
        shuffle: bool = True,
        verbose: int | bool = 1,
    ) -> dict[str, list[float]]:
        """Train; returns the history, one list per quantity.

        Parameters
        ----------
        X : array-like (N, I)
            Converted once to the model's dtype.
        y : array-like
            Labels (N,) for ``softmax_cross_entropy``; values (N, O) for the other losses.
        batch_size, epochs : int
            The last batch of an epoch may be smaller.
        validation_data : (X, y) or (X, y, sample_weight), optional
        validation_split : float
            Share of the rows, taken from the end before shuffling, that is held out for validation.
        sample_weight : array-like (N,), optional
            A batch's loss is then sum(w l) / sum(w).
        callbacks : iterable of Callback
        shuffle : bool
            A fresh permutation each epoch; False keeps the order.
        verbose : int or bool
            0 shows nothing; otherwise a progress bar when the output is a terminal.

        Raises
        ------
        ValueError, TypeError
            With what was expected, what was found, and what to do; nothing has been changed then.
        """
        loss, optimizer = self._compiled()
        whole_number(batch_size, "batch_size")
        whole_number(epochs, "epochs")
        with self._lock:
            X = as_matrix(X, self._asked["dtype"], "X")
            if not 0 <= validation_split < 1:
                raise ValueError(f"validation_split: expected a share in [0, 1), found {validation_split!r}")
            if validation_data is not None and not 2 <= len(validation_data) <= 3:
                raise ValueError("validation_data: expected (X, y) or (X, y, sample_weight)")
            builder = self._ready(X.shape[1])
            targets = self._targets(loss, y, X.shape[0])
            weight = as_weights(sample_weight, X.shape[0], self._asked["dtype"])
            if validation_split and validation_data is None:
                X, targets, weight, validation_data = split_validation(X, targets, weight, validation_split)
            if validation_data is not None:  # checked now, not after the first epoch
                self._check_validation(validation_data, loss)
            count, batch = X.shape[0], min(batch_size, X.shape[0])
            feed = Feed(count, shuffle, weight is not None, targets.ndim == 1)
            bound = self._program(
                ("fit", batch, feed),
                lambda: builder.train(
                    batch, feed, loss, optimizer, self._memory, self._moments, self._asked["fuse"]
                ),
            )
            bound.executor.slot(bound.x, X)
            bound.executor.slot(bound.targets, targets)
            if weight is not None:
                bound.executor.slot(bound.weight, weight)
            with limit_blas(self._backend, config.resolve_threads(None, self._asked["threads"])):
                return train(
                    self,
                    bound.executor,
                    count,
                    batch,
                    epochs,
                    self.epoch,
                    validation_data,
                    list(callbacks),
                    verbose,
                    loss.metric,
                )

    def train_on_batch(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """One training step; returns the batch's mean loss before the update."""
        loss, optimizer = self._compiled()
        with self._lock:
            X = as_matrix(X, self._asked["dtype"], "X")
            builder = self._ready(X.shape[1])
            targets = self._targets(loss, y, X.shape[0])
            weight = as_weights(sample_weight, X.shape[0], self._asked["dtype"])
            feed, rows = Feed(weighted=weight is not None, labels=targets.ndim == 1), X.shape[0]
            capacity = self._capacity("batch", feed, rows)
            bound = self._program(
                ("batch", capacity, feed),
                lambda: builder.train(
                    capacity, feed, loss, optimizer, self._memory, self._moments, self._asked["fuse"]
                ),
            )
            executor = bound.executor
            executor.slot(bound.x, X)
            executor.slot(bound.targets, targets)
            if weight is not None:
                executor.slot(bound.weight, weight)
            executor.run(Run(rows=rows, step=self.step, epoch=self.epoch, total_rows=rows, lr=self.lr))
            self.step += 1
            return float(executor.stored(executor.stats)[0])

    def _capacity(self, kind: str, setting: Any, rows: int) -> int:
        """Rows of a Program that holds a batch of this size: a bound one that is large enough, or a new one."""
        known = [k[1] for k in self._bound if k[0] == kind and k[2] == setting and k[1] >= rows]
        return min(known, default=rows)

    def _targets(self, loss: losses.Loss, y: Any, rows: int) -> np.ndarray:
        targets = loss.check_targets(y, self._built().out_width, self._asked["dtype"])
        if targets.shape[0] != rows:
            raise ValueError(f"y: expected {rows} rows, as many as X has, found {targets.shape[0]}")
        return targets

    def _check_validation(self, data: tuple[Any, ...], loss: losses.Loss) -> None:
        X = as_matrix(data[0], self._asked["dtype"], "validation X")
        if X.shape[1] != self._built().width:
            raise ValueError(f"validation X: expected {self._built().width} features, found {X.shape[1]}")
        self._targets(loss, data[1], X.shape[0])
        as_weights(data[2] if len(data) > 2 else None, X.shape[0], self._asked["dtype"])

    # ------------------------------------------------------------------ loops of the user's own
    def forward(self, X: Any, training: bool = False) -> np.ndarray:
        """Output of the last layer, (N, O). With ``training`` the pass is remembered for `backward`."""
        with self._lock:
            X = as_matrix(X, self._asked["dtype"], "X")
            builder = self._ready(X.shape[1])
            rows = X.shape[0]
            if not training:
                return self.predict(X)
            capacity = self._capacity("loop", "", rows)
            bound = self._program(
                ("loop", capacity, ""),
                lambda: builder.loop(
                    capacity, self.optimizer, self._memory, self._moments, True, self._asked["fuse"]
                ),
            )
            bound.executor.slot(bound.x, X)
            if bound.dy not in bound.executor._slots:
                bound.executor.slot(bound.dy, np.zeros((rows, builder.out_width), self._asked["dtype"]))
            bound.executor.run(Run(rows=rows, step=self.step, total_rows=rows), "feed", "forward")
            self._last = bound, rows
            return bound.executor.read(bound.y, rows)

    def backward(self, dy: Any, accumulate: bool = False) -> np.ndarray:
        """Gradients of the last ``forward(training=True)`` into `gradients`; returns the gradient of its input, (N, I).

        Parameters
        ----------
        dy : array-like (N, O)
            Gradient of the loss with respect to the output.
        accumulate : bool
            Add to the gradients instead of replacing them.
        """
        with self._lock:
            if self._last is None:
                raise ValueError("backward needs a forward pass: call forward(X, training=True) first")
            bound, rows = self._last
            dy = as_matrix(dy, self._asked["dtype"], "dy")
            if dy.shape != (rows, self._built().out_width):
                raise ValueError(f"dy: expected shape {(rows, self._built().out_width)}, found {dy.shape}")
            before = self._memory.gradients.copy() if accumulate else None
            bound.executor.slot(bound.dy, dy)
            bound.executor.run(Run(rows=rows, step=self.step, total_rows=rows), "backward")
            if before is not None:
                self._memory.gradients += before
            return bound.executor.read(bound.dx, rows)

    def update(self) -> None:
        """One step of the optimiser with the gradients at hand; advances ``step``."""
        if self.optimizer is None:
            raise ValueError("the model has no optimiser yet: call compile(optimizer=...) first")
        with self._lock:
            if self._last is None:
                raise ValueError("update needs gradients: call forward(X, training=True) and backward(dy) first")
            bound, rows = self._last
            bound.executor.run(Run(rows=rows, step=self.step, lr=self.lr), "update")
            self.step += 1

    # ------------------------------------------------------------------ inference
    def predict(self, X: Any) -> np.ndarray:
        """Output of the last layer for every row, (N, O): logits where the loss takes logits."""
        with self._lock:
            X = as_matrix(X, self._asked["dtype"], "X")
            builder = self._ready(X.shape[1])
            rows = min(PREDICT_ROWS, X.shape[0])
            capacity = self._capacity("predict", "", rows)
            bound = self._program(
                ("predict", capacity, ""),
                lambda: builder.loop(capacity, None, self._memory, {}, False, self._asked["fuse"]),
            )
            out = np.empty((X.shape[0], builder.out_width), self._asked["dtype"])
            for start in range(0, X.shape[0], rows):
                piece = X[start : start + rows]
                bound.executor.slot(bound.x, piece)
                bound.executor.run(Run(rows=piece.shape[0], total_rows=piece.shape[0]))
                out[start : start + rows] = bound.executor.read(bound.y, piece.shape[0])
            return out

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Mean loss, and accuracy where the loss has one, with running statistics and no dropout."""
        loss, _ = self._compiled()
        with self._lock:
            X = as_matrix(X, self._asked["dtype"], "X")
            builder = self._ready(X.shape[1])
            targets = self._targets(loss, y, X.shape[0])
            weight = as_weights(sample_weight, X.shape[0], self._asked["dtype"])
            rows = min(PREDICT_ROWS, X.shape[0])
            feed = Feed(weighted=weight is not None, labels=targets.ndim == 1)
            capacity = self._capacity("evaluate", feed, rows)
            bound = self._program(
                ("evaluate", capacity, feed),
                lambda: builder.evaluate(capacity, feed, loss, self._memory, self._asked["fuse"]),
            )
            slots = {bound.x: X, bound.targets: targets}
            if weight is not None:
                slots[bound.weight] = weight
            total, mass, correct = evaluate_batches(bound.executor, slots, X.shape[0], rows)
            found = {"loss": total / mass}
            if loss.metric is not None:
                found[loss.metric] = correct / X.shape[0]
            return found

    # ------------------------------------------------------------------ what is inside
    @property
    def backend(self) -> str:
        """Back end that holds the parameters and runs the Programs."""
        self._built()
        return self._ready() and self._backend

    @property
    def threads(self) -> int:
        """Threads of a training step."""
        return self._threads(self.program)[0]

    @property
    def program(self) -> Program:
        """The training Program (or the user's loop, without a loss) for the last batch size, or for 32 rows."""
        with self._lock:
            builder = self._ready()
            for key, bound in reversed(self._bound.items()):
                if key[0] in ("fit", "batch"):
                    return bound.executor.program
            fused = self._asked["fuse"]
            if self.loss is None:
                return builder.loop(32, self.optimizer, self._memory, self._moments, True, fused)[0]
            feed = Feed(labels=self.loss.target_kind == "labels")
            return builder.train(32, feed, self.loss, self.optimizer, self._memory, self._moments, fused)[0]

    @property
    def weights(self) -> Weights:
        """Parameters and running statistics by name: reading copies out, assigning copies in."""
        builder = self._ready()
        arenas = [(a, a.values) for a in (self._memory.parameters, self._memory.states)]
        names = [*builder.segments, *builder.states]
        return Weights(arenas, sorted(names, key=self._layer_order))

    @property
    def gradients(self) -> Weights:
        """Gradients of the last backward pass, by the parameters' names."""
        builder = self._ready()
        return Weights([(self._memory.parameters, self._memory.gradients)], list(builder.segments))

    def _layer_order(self, name: str) -> int:
        return [n for n, _ in self.layers].index(name.split("/")[0])

    def get_state(self) -> dict[str, np.ndarray]:
        """Copies of every parameter and running statistic."""
        return {name: value.copy() for name, value in self.weights.items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `get_state` gave."""
        weights = self.weights
        for name, value in state.items():
            weights[name] = value

    def explain(self) -> str:
        """Which back end runs this model with how many threads, and why not another."""
        self._ready()
        threads, why = self._threads(self.program)
        lines = [f"back end {self._backend}, {threads} thread{'s' if threads > 1 else ''} ({why})"]
        for name in BACKENDS:
            if name != self._backend:
                reasons = self._refusals(name)
                lines.append(f"  {name}: {reasons[0] if reasons else 'could run it'}")
        return "\n".join(lines)

    def summary(self) -> str:
        """A table of the layers; printed and returned."""
        builder = self._ready()
        rows = [("layer", "type", "output", "parameters")]
        for (name, layer), width in zip(self.layers, builder.outputs, strict=True):
            sizes = [int(np.prod(s.buffer.shape)) for n, s in builder.segments.items() if n.startswith(f"{name}/")]
            rows.append((name, type(layer).__name__, f"(N, {width})", f"{sum(sizes):,}"))
        widths = [max(len(r[k]) for r in rows) for k in range(4)]
        lines = ["  ".join(f"{c:<{w}}" if k < 3 else f"{c:>{w}}" for k, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
        total = sum(int(np.prod(s.buffer.shape)) for s in builder.segments.values())
        lines.append(f"{total:,} parameters, input (N, {builder.width}), {self._asked['dtype']}, back end {self._backend}")
        text = "\n".join(line.rstrip() for line in lines)
        print(text)
        return text

    # ------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write architecture and weights to a safetensors file, in one atomic step.

        Parameters
        ----------
        path : path
        extra : mapping, optional
            JSON values that come back as ``extra`` of the loaded model.
        """
        builder = self._ready()
        description = {
            "layers": [layer.get_config() for _, layer in self.layers],
            "seed": self.seed,
            "width": builder.width,
            "dtype": self._asked["dtype"],
            "step": self.step,
            "epoch": self.epoch,
            "loss": None if self.loss is None else self.loss.name,
            "optimizer": None if self.optimizer is None else self.optimizer.to_config(),
            "extra": dict(self.extra if extra is None else extra),
        }
        checkpoint.write(path, dict(self.weights), description)

    def __repr__(self) -> str:
        return f"Sequential([{', '.join(repr(layer) for _, layer in self.layers)}], seed={self.seed})"


def load(path: str | os.PathLike[str], backend: str = "auto", threads: int | str = "auto") -> Sequential:
    """Read a model that `Sequential.save` wrote.

    Raises
    ------
    ModelFileError
        The file is truncated, foreign, or does not fit its own description.
    """
    tensors, description = checkpoint.read(path)
    try:
        net = Sequential([from_config(c) for c in description["layers"]], seed=description["seed"])
        optimizer = description["optimizer"]
        net.compile(
            loss=description["loss"],
            optimizer="adam" if optimizer is None else optimizers.from_config(optimizer),
            backend=backend,
            threads=threads,
            dtype=description["dtype"],
        )
        net.build(description["width"])
        if set(tensors) != set(net.weights):
            raise ValueError(f"tensors {sorted(set(tensors) ^ set(net.weights))} do not match the layers")
        net.set_state(tensors)
        net.step, net.epoch, net.extra = description["step"], description["epoch"], description["extra"]
    except BackendUnavailable:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{os.fspath(path)}: the model does not fit its description: {error}") from error
    return net
