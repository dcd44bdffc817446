"""`Sequential`: layers, one after the other, trained and run through Programs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdl import config, describe, losses, optimizers
from fastdl.builder import Bound, Feed
from fastdl.callbacks import Callback
from fastdl.errors import BackendUnavailable, ModelFileError
from fastdl.inputs import as_matrix, as_targets, as_weights, split_validation, whole_number
from fastdl.kernels import dispatch
from fastdl.layers.base import Layer, from_config
from fastdl.program import Program
from fastdl.run import checkpoint
from fastdl.run.arena import Weights
from fastdl.run.executor import Run
from fastdl.run.runtime import Runtime, Settings
from fastdl.run.trainer import evaluate_batches, train

DTYPES = ("float32", "float64", dispatch.MIXED)


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
        self.lr = 0.0  #: learning rate in use; assign to change it
        self._settings = Settings()
        self._runtime: Runtime | None = None
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
        """Choose how to train; returns the model. Parameters stay, the optimiser starts anew.

        Parameters
        ----------
        loss : {"softmax_cross_entropy", "binary_cross_entropy", "mse"} or Loss
        optimizer : {"sgd", "adam", "adamw"} or Optimizer
        backend : {"auto", "numpy", "numba", "cython", "cuda"}
        threads : "auto" or int
        dtype : {"float32", "float64", "mixed_bfloat16"}
            The last one keeps float32 parameters and sums, and rounds the operands of dense products to bfloat16, on
            a GPU every matrix between two calls: compiled back end, on CPUs with AMX or AVX512-BF16, and CUDA.
        fuse : bool
            False runs the calls as the layers name them.

        Raises
        ------
        ValueError
            For an unknown name; the known ones are listed.
        BackendUnavailable
            When the back end cannot run here; the message says why.
        """
        dtype = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        if dtype not in DTYPES:
            raise ValueError(f"dtype: unknown {dtype!r}, known: {', '.join(DTYPES)}")
        if threads != "auto":
            config.check_threads(threads)
        config.check_backend(backend)
        if backend != "auto" and (state := dispatch.load(backend)) != "available":
            raise BackendUnavailable(f"back end {backend!r} is not available: {state}")
        asked = "cython" if backend == "auto" and dtype == dispatch.MIXED else backend
        if asked != "auto" and (why := dispatch.refuses(asked, dtype)):
            raise BackendUnavailable(f"dtype {dtype!r} cannot run here: {why}; use 'float32'")
        settings = Settings(
            backend, threads, dtype, bool(fuse), None if loss is None else losses.get(loss), optimizers.get(optimizer)
        )
        with self._lock:
            if self._runtime is not None:
                if dtype != self._settings.dtype:
                    raise ValueError(
                        f"dtype: this model is built with {self._settings.dtype}, found {dtype}; make a new model"
                    )
                self._runtime.reset(settings)
            self._settings, self.lr, self.step, self._last = settings, settings.optimizer.lr, 0, None
        return self

    def build(self, width: int) -> Sequential:
        """Fix the number of input features and draw the initial weights; `fit` and `predict` do it by themselves."""
        with self._lock:
            self._ready(whole_number(width, "input features"))
        return self

    def _ready(self, width: int | None = None) -> Runtime:
        """The runtime: built if the input is known, and on the back end that is asked for now."""
        runtime = self._runtime
        if runtime is None:
            if width is None:
                raise ValueError(
                    "the model does not know its input yet: call fit(), predict() or build(features) first"
                )
            self._runtime = runtime = Runtime(self.layers, width, self.seed, self._settings)
        elif width is not None and runtime.builder.width != width:
            raise ValueError(f"expected {runtime.builder.width} features, as this model was built, found {width}")
        runtime.follow()
        return runtime

    @property
    def loss(self) -> losses.Loss | None:
        return self._settings.loss

    @property
    def optimizer(self) -> optimizers.Optimizer | None:
        return self._settings.optimizer

    def _on_gpu(self) -> bool:
        return config.resolve_backend(None, self._settings.backend) == "cuda"

    def _loss(self) -> losses.Loss:
        if self.loss is None:
            raise ValueError("the model has no loss yet: call compile(loss=..., optimizer=...) first")
        return self.loss

    def _inputs(self, X: Any, y: Any, sample_weight: Any, name: str = "") -> tuple[np.ndarray, np.ndarray, Any]:
        """X, targets and weights as the kernels take them, checked against each other and the model."""
        dtype, gpu = self._settings.float, self._on_gpu()
        X = as_matrix(X, dtype, f"{name}X", gpu)
        width = self._ready(X.shape[1]).builder.out_width
        targets = as_targets(y, self._loss(), width, dtype, f"{name}y", gpu)
        if targets.shape[0] != X.shape[0]:
            raise ValueError(f"{name}y: expected {X.shape[0]} rows, as many as X has, found {targets.shape[0]}")
        return X, targets, as_weights(sample_weight, X.shape[0], dtype, gpu)

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
            Converted once to the model's dtype. With ``backend="cuda"`` it may lie in GPU memory (PyTorch, CuPy, Numba
            or JAX; float32): nothing is copied then.
        y : array-like
            Labels (N,) for ``softmax_cross_entropy``; values (N, O) for the other losses. In GPU memory int64 or
            float32; values are not checked there, and a label without an output makes the loss NaN.
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
        whole_number(batch_size, "batch_size")
        whole_number(epochs, "epochs")
        if not 0 <= validation_split < 1:
            raise ValueError(f"validation_split: expected a share in [0, 1), found {validation_split!r}")
        if validation_data is not None and not 2 <= len(validation_data) <= 3:
            raise ValueError("validation_data: expected (X, y) or (X, y, sample_weight)")
        with self._lock:
            X, targets, weight = self._inputs(X, y, sample_weight)
            if validation_data is not None:
                validation_data = self._inputs(*validation_data[:2], *(validation_data[2:] or (None,)), "validation ")
            elif validation_split:
                X, targets, weight, validation_data = split_validation(X, targets, weight, validation_split)
            runtime = self._ready()
            count, batch = X.shape[0], min(batch_size, X.shape[0])
            executor = runtime.epochs(X, targets, weight, batch, shuffle)
            metric = self._loss().metric
            return train(self, executor, count, batch, epochs, validation_data, list(callbacks), verbose, metric)

    def train_on_batch(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """One training step; returns the batch's mean loss before the update."""
        with self._lock:
            quick = None if self._runtime is None or sample_weight is not None else self._runtime.quick()
            loss = None if quick is None else quick.run(X, y, self.step, self.epoch, self.step, self.lr)
            if loss is not None:
                self.step += 1
                return loss
            X, targets, weight = self._inputs(X, y, sample_weight)
            rows = X.shape[0]
            bound = self._runtime.train(rows, Feed(weighted=weight is not None, labels=targets.ndim == 1))
            bound.feed(X, targets, weight)
            executor = bound.executor
            executor.run(Run(rows, self.step, self.epoch, total_rows=rows, update=self.step, lr=self.lr))
            self.step += 1
            if weight is None:
                self._runtime.keep_quick(bound)
            return float(executor.stored(executor.stats)[0])

    # ------------------------------------------------------------------ loops of the user's own
    def forward(self, X: Any, training: bool = False) -> np.ndarray:
        """Output of the last layer, (N, O). With ``training`` the pass is remembered for `backward`."""
        if not training:
            return self.predict(X)
        with self._lock:
            X = as_matrix(X, self._settings.float, "X", self._on_gpu())
            runtime, rows = self._ready(X.shape[1]), X.shape[0]
            bound = runtime.loop(rows)
            executor = bound.executor
            executor.slot(bound.x, X)
            blank = np.zeros((rows, runtime.builder.out_width), self._settings.float)
            executor.slot(bound.dy, blank)  # until backward() knows
            executor.run(Run(rows=rows, step=self.step, total_rows=rows), "feed", "forward")
            self._last = bound, rows
            return executor.read(bound.y, rows)

    def _last_pass(self) -> tuple[Bound, int]:
        if self._last is None or self._last[0].executor.memory is not self._ready().memory:
            raise ValueError("no forward pass to go back through: call forward(X, training=True) first")
        return self._last

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
            bound, rows = self._last_pass()
            dy = as_matrix(dy, self._settings.float, "dy", self._on_gpu())
            shape = rows, self._runtime.builder.out_width
            if dy.shape != shape:
                raise ValueError(f"dy: expected shape {shape}, found {dy.shape}")
            memory = self._runtime.memory
            gradients = memory.gradients
            if accumulate:
                memory.pull()
            before = gradients.copy() if accumulate else None
            bound.executor.slot(bound.dy, dy)
            bound.executor.run(Run(rows=rows, step=self.step, total_rows=rows), "backward")
            if before is not None:
                memory.pull()
                gradients += before
                memory.version[0] += 1
            return bound.executor.read(bound.dx, rows)

    def update(self) -> None:
        """One step of the optimiser with the gradients at hand; advances ``step``."""
        if self.optimizer is None:
            raise ValueError("the model has no optimiser yet: call compile(optimizer=...) first")
        with self._lock:
            bound, rows = self._last_pass()
            bound.executor.run(Run(rows=rows, step=self.step, update=self.step, lr=self.lr), "update")
            self.step += 1

    # ------------------------------------------------------------------ inference
    def predict(self, X: Any) -> np.ndarray:
        """Output of the last layer for every row, (N, O): logits where the loss takes logits."""
        with self._lock:
            if self._runtime is not None and (out := self._runtime.predict_direct(X)) is not None:
                return out
            X = as_matrix(X, self._settings.float, "X", self._on_gpu())
            return self._ready(X.shape[1]).predict(X)

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Mean loss, and accuracy where the loss has one, with running statistics and no dropout."""
        with self._lock:
            X, targets, weight = self._inputs(X, y, sample_weight)
            rows = min(self._runtime.most_rows, X.shape[0])
            bound = self._runtime.evaluate(rows, Feed(weighted=weight is not None, labels=targets.ndim == 1))
            total, mass, correct = evaluate_batches(bound, X, targets, weight, rows)
            found = {"loss": total / mass}
            if self._loss().metric is not None:
                found[self._loss().metric] = correct / X.shape[0]
            return found

    # ------------------------------------------------------------------ what is inside
    @property
    def backend(self) -> str:
        """Back end that holds the parameters and runs the Programs."""
        return self._ready().backend

    @property
    def threads(self) -> int:
        """Threads of a training step."""
        return self._ready().threads(self.program)[0]

    @property
    def program(self) -> Program:
        """The training Program (or the user's loop, without a loss) of the last batch size, or of 32 rows."""
        with self._lock:
            return self._ready().training_program()

    @property
    def weights(self) -> Weights:
        """Parameters and running statistics by name: reading copies out, assigning copies in."""
        return self._ready().weights

    @property
    def gradients(self) -> Weights:
        """Gradients of the last backward pass, by the parameters' names."""
        return self._ready().gradients

    def get_state(self) -> dict[str, np.ndarray]:
        """Copies of every parameter and running statistic."""
        return dict(self.weights)

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `get_state` gave."""
        weights = self.weights
        for name, value in state.items():
            weights[name] = value

    def plan(self, backend: str = "cuda", batch_size: int = 32) -> str:
        """The launches of a training step on a GPU, for at most ``batch_size`` rows; needs neither GPU nor driver.

        Raises
        ------
        ValueError
            For another back end: their Programs are ``net.program``.
        """
        if backend != "cuda":
            raise ValueError(f"plan: expected 'cuda', found {backend!r}; net.program lists the calls of the others")
        whole_number(batch_size, "batch_size")
        with self._lock:
            return self._ready().plan(batch_size)

    def explain(self) -> str:
        """Which back end runs this model with how many threads, and why not another."""
        return describe.explain(self._ready(), self.program)

    def summary(self) -> str:
        """A table of the layers; printed and returned."""
        text = describe.summary(self.layers, self._ready())
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
        description = {
            "layers": [layer.get_config() for _, layer in self.layers],
            "seed": self.seed,
            "width": self._ready().builder.width,
            "dtype": self._settings.dtype,
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
