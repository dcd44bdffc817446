"""`Sequential`: layers, one after the other, trained and run through Programs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastdl import config, losses
from fastdl.builder import Builder, Feed
from fastdl.callbacks import Callback, as_list
from fastdl.checks import flag, whole
from fastdl.errors import BackendUnavailable, ModelFileError
from fastdl.inputs import (
    as_matrix,
    as_targets,
    as_validation,
    as_weights,
    by_name,
    split_validation,
    whole_number,
)
from fastdl.net import Net
from fastdl.run import checkpoint
from fastdl.run.executor import Executor, Run
from fastdl.run.placement import Bound
from fastdl.run.runtime import Runtime
from fastdl.run.settings import Settings
from fastdl.run.state import MOST
from fastdl.run.trainer import Trainer
from fastdl.snapshot import Snapshot


class Sequential(Net):
    """A stack of layers.

    Parameters
    ----------
    layers : sequence of Layer
        Each layer object once: a layer that stands twice in a net would have to share its parameters.
    seed : int
        Key of every random stream of the model: initial weights, dropout masks, epoch permutations. 64 bits.

    Notes
    -----
    A net may be used from any number of Python threads. Trainings of one net run one after the other; `predict`,
    `evaluate` and whatever reads are answered between two slices of a training, within about 0.1 s.

    Examples
    --------
    >>> net = Sequential([layers.Dense(64), layers.BatchNorm(), layers.ReLU(), layers.Dense(10)], seed=42)
    >>> net.compile(loss="softmax_cross_entropy", optimizer="adam")
    >>> history = net.fit(X, y, batch_size=128, epochs=10)
    """

    def _on_gpu(self) -> bool:
        return config.resolve_backend(None, self._settings.backend) == "cuda"

    def _loss(self) -> losses.Loss:
        if self.loss is None:
            raise ValueError("the model has no loss yet: call compile(loss=..., optimizer=...) first")
        return self.loss

    def _matrix(self, X: Any, name: str, finite: bool = False) -> Any:
        """X as the kernels take it, the columns of a frame by their names."""
        X = by_name(X, self.feature_names, name)
        return as_matrix(X, self._settings.float, name, self._on_gpu(), finite)

    def _inputs(
        self, X: Any, y: Any, sample_weight: Any, name: str = "", width: int | None = None, finite: bool = False
    ) -> tuple[Builder, tuple[Any, Any, Any]]:
        """X, targets and weights as the kernels take them, checked against each other and the model on paper.

        ``width`` is that of the training rows, where these are others. ``finite`` refuses NaN and infinities in X.
        """
        dtype, gpu = self._settings.float, self._on_gpu()
        X = self._matrix(X, f"{name}X", finite)
        if width not in (None, X.shape[1]):
            raise ValueError(f"{name}X: expected {width} features, as X has, found {X.shape[1]}")
        builder = self._builder(X.shape[1])
        targets = as_targets(y, self._loss(), builder.out_width, dtype, f"{name}y", gpu)
        if targets.shape[0] != X.shape[0]:
            raise ValueError(f"{name}y: expected {X.shape[0]} rows, as many as X has, found {targets.shape[0]}")
        return builder, (X, targets, as_weights(sample_weight, X.shape[0], dtype, gpu, f"{name}sample_weight"))

    # ------------------------------------------------------------------ training
    def fit(
        self,
        X: Any,
        y: Any,
        batch_size: int = 32,
        epochs: int = 1,
        validation_data: tuple[Any, ...] | None = None,
        validation_split: float | None = 0.0,
        sample_weight: Any = None,
        callbacks: Callback | Iterable[Callback] | None = (),
        shuffle: bool = True,
        verbose: int | bool = 1,
    ) -> dict[str, list[float]]:
        """Train; returns the history, one list per quantity.

        Epochs, schedules and masks go on where the last call ended: `epoch` and `step` count over all calls. An
        interrupt (Ctrl-C) comes out between two slices: the steps taken stay, the next call begins that epoch again.

        Parameters
        ----------
        X : array-like (N, I)
            Finite numbers, converted once to the model's dtype; the columns of a frame are told by their names (see
            `feature_names`). With ``backend="cuda"`` it may lie in GPU memory
            (PyTorch, CuPy, Numba or JAX; float32): nothing is copied then, and values are not looked at.
        y : array-like
            Labels (N,) for ``softmax_cross_entropy``; values (N, O) for the other losses. In GPU memory int64 or
            float32; values are not checked there, and a label without an output makes the loss NaN.
        batch_size, epochs : int
            The last batch of an epoch may be smaller.
        validation_data : (X, y) or (X, y, sample_weight), optional
        validation_split : float
            Share of the rows, taken from the end before shuffling, that is held out for validation.
        sample_weight : array-like (N,), optional
            The loss is then sum(w l) / sum(w), in a batch, in the history and in `evaluate`.
        callbacks : iterable of Callback, or one
        shuffle : bool
            A fresh permutation each epoch; False keeps the order.
        verbose : int or bool
            0 shows nothing; otherwise a progress bar when the output is a terminal.

        Raises
        ------
        ValueError, TypeError
            With what was expected, what was found, and what to do; nothing has been changed then.
        NetAtWork
            From a signal handler, in the middle of a step.
        TrainingInProgress
            From a callback, where the context names another back end than that of the training under way.
        """
        batch_size, epochs = whole_number(batch_size, "batch_size"), whole_number(epochs, "epochs")
        validation_split, validation_data = as_validation(validation_split, validation_data)
        callbacks, shuffle = as_list(callbacks), flag(shuffle, "shuffle")
        verbose = verbose if isinstance(verbose, bool | np.bool_) else whole(verbose, "verbose")
        locks, state = self._locks, self._state
        with locks.training:
            with locks.memory:
                given = X
                builder, (X, targets, weight) = self._inputs(X, y, sample_weight, finite=True)
                held = None
                if validation_data is not None:
                    _, held = self._inputs(*validation_data, "validation ", X.shape[1], finite=True)
                elif validation_split:
                    X, targets, weight, held = split_validation(X, targets, weight, validation_split)
                runtime = self._built(builder, given)
                batch = min(batch_size, X.shape[0])
                data = runtime.working().data_set(X, targets, weight, batch, shuffle)
            for callback in callbacks:
                callback.model = self
            trainer = Trainer(data, state, locks, X.shape[0], batch, self._loss().metric)
            evaluate = None if held is None else lambda: self._evaluated(runtime, *held)
            depth, stop = locks.depth, state.stop
            try:
                locks.depth = depth + 1
                return trainer.run(epochs, evaluate, callbacks, verbose)
            finally:
                locks.depth = depth  # first, and by no call: a second interrupt must find it done
                if depth:
                    state.stop = stop  # that of the training around this one
                with locks.memory:
                    data.let_go()

    def train_on_batch(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """One training step; returns the batch's mean loss before the update.

        Values of X are not looked at, as `fit` does: NaN there makes the loss and the parameters NaN.
        """
        locks = self._locks
        with locks.training, locks.memory:
            if locks.at_work:
                locks.refuse()
            state, runtime = self._state, self._runtime
            quick = None if runtime is None or sample_weight is not None else runtime.quick()
            loss = None
            if quick is not None:
                try:
                    loss = quick(X, y, state.step, state.epoch, state.update, state.lr)
                except BaseException:
                    if quick.__self__.done:  # a signal is raised as soon as the engine returns
                        state.advance()
                    raise
            if loss is None:
                return self._train_on_batch(X, y, sample_weight)
            if state.update < MOST and state.step < MOST:  # as `advance`, 0.1 us sooner
                state.step, state.update, state.rows = state.step + 1, state.update + 1, 0
            else:
                state.advance()
            return loss

    def _train_on_batch(self, X: Any, y: Any, sample_weight: Any) -> float:
        builder, (x, targets, weight) = self._inputs(X, y, sample_weight)
        state, rows = self._state, x.shape[0]
        placement = self._built(builder, X).working()
        bound = placement.train(rows, Feed(weighted=weight is not None, labels=targets.ndim == 1))
        run = Run(rows=rows, step=state.step, update=state.update, epoch=state.epoch, total_rows=rows, lr=state.lr)
        try:
            self._locks.at_work = True
            bound.feed(x, targets, weight)
            self._step(bound.executor, run)
        finally:
            self._locks.at_work = False
            bound.let_go()
        if weight is None:
            placement.keep_quick(bound)
        return float(bound.executor.stored(bound.executor.stats)[0])

    def _step(self, executor: Executor, run: Run, *phases: str) -> None:
        """Run an update and count it, also where a signal is raised as soon as it is done."""
        done = executor.runs
        try:
            executor.run(run, *phases)
        finally:
            if executor.runs != done:
                self._state.advance()

    # ------------------------------------------------------------------ loops of the user's own
    def forward(self, X: Any, training: bool = False, first_row: int | None = None) -> np.ndarray:
        """Output of the last layer, (N, O). With ``training`` the pass is remembered for `backward`.

        Parameters
        ----------
        X : array-like (N, I)
        training : bool
        first_row : int, optional
            Row of the step's full batch at which X begins: dropout draws by it. By default rows count on from the last
            `update`, so that micro-batches draw the masks of the whole batch, and a pass that is repeated draws new
            ones. Give 0 to draw the first ones again, for differences of the loss, say.
        """
        if not flag(training, "training"):
            return self.predict(X)
        locks = self._locks
        with locks.training, locks.memory:
            if locks.at_work:
                locks.refuse()
            x = self._matrix(X, "X")
            first = self._state.rows if first_row is None else whole(first_row, "first_row", 62)
            runtime, rows = self._built(self._builder(x.shape[1]), X), x.shape[0]
            bound = runtime.working().loop(rows)
            executor = bound.executor
            run = Run(rows=rows, step=self._state.step, first_row=first, total_rows=rows)
            try:
                locks.at_work = True
                executor.slot(bound.x, x)
                executor.run(run, "feed", "forward")
                self._last, self._state.rows, runtime.pending = (bound, run), first + rows, True
                return executor.read(bound.y, rows)
            finally:
                locks.at_work = False
                executor.slot(bound.x, None)

    def _last_pass(self) -> tuple[Bound, Run]:
        if self._last is None or self._last[0].executor.memory is not self._built().memory:
            raise ValueError("no forward pass to go back through: call forward(X, training=True) first")
        return self._last

    def backward(self, dy: Any, accumulate: bool = False) -> np.ndarray:
        """Gradients of the last ``forward(training=True)`` into `gradients`; returns the gradient of its input, (N, I).

        Masks are those of that pass, whatever has been trained since.

        Parameters
        ----------
        dy : array-like (N, O)
            Gradient of the loss with respect to the output.
        accumulate : bool
            Add to the gradients instead of replacing them.
        """
        accumulate, locks = flag(accumulate, "accumulate"), self._locks
        with locks.training, locks.memory:
            if locks.at_work:
                locks.refuse()
            bound, run = self._last_pass()
            dy = as_matrix(dy, self._settings.float, "dy", self._on_gpu())
            shape = run.rows, self._runtime.builder.out_width
            if dy.shape != shape:
                raise ValueError(f"dy: expected shape {shape}, found {dy.shape}")
            memory, executor = self._runtime.memory, bound.executor
            memory.pull()
            before = memory.gradients.copy() if accumulate else None
            try:
                locks.at_work = True
                executor.slot(bound.dy, dy)
                executor.run(run, "backward")
                if before is not None:
                    memory.pull()
                    np.add(memory.gradients, before, out=memory.gradients)
                    memory.changed()
                return executor.read(bound.dx, run.rows)
            finally:
                locks.at_work = False
                executor.slot(bound.dy, None)

    def update(self) -> None:
        """One step of the optimiser with the gradients at hand; advances ``step``."""
        if self.optimizer is None:
            raise ValueError("the model has no optimiser yet: call compile(optimizer=...) first")
        locks = self._locks
        with locks.training, locks.memory:
            if locks.at_work:
                locks.refuse()
            runtime, state = self._built(), self._state
            if self._last is None and not state.rows:
                raise ValueError("no gradients yet: call forward(X, training=True) and backward(dy) first")
            rows = self._last[1].rows if self._last else state.rows
            executor = runtime.placement.loop(rows).executor
            try:
                locks.at_work = True
                run = Run(rows=rows, step=state.step, update=state.update, lr=state.lr)
                self._step(executor, run, "update")
            finally:
                locks.at_work = runtime.pending = False

    # ------------------------------------------------------------------ inference
    def predict(self, X: Any) -> np.ndarray:
        """Output of the last layer for every row, (N, O): logits where the loss takes logits."""
        runtime, locks = self._runtime, self._locks
        with locks.memory:
            if locks.at_work:
                locks.refuse()
            if runtime is not None and (out := runtime.predict_direct(X)) is not None:
                return out
            x = self._matrix(X, "X")
            placement = self._built(self._builder(x.shape[1]), X).reading()
            try:
                locks.at_work = True
                return placement.predict(x)
            finally:
                locks.at_work = False

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Mean loss, and accuracy where the loss has one, with running statistics and no dropout."""
        with self._locks.memory:
            builder, data = self._inputs(X, y, sample_weight)
            return self._evaluated(self._built(builder, X), *data)

    def _evaluated(self, runtime: Runtime, X: Any, targets: Any, weight: Any = None) -> dict[str, float]:
        locks = self._locks
        with locks.memory:
            if locks.at_work:
                locks.refuse()
            placement = runtime.reading()
            try:
                locks.at_work = True
                total, mass, correct = placement.evaluate(X, targets, weight)
            finally:
                locks.at_work = False
        values = {"loss": total / mass if mass else math.nan}
        if self._loss().metric is not None:
            values[self._loss().metric] = correct / X.shape[0]
        return values


def load(
    path: str | os.PathLike[str], backend: str = "auto", threads: int | str = "auto", dtype: str | None = None
) -> Sequential:
    """Read a model that `Sequential.save` wrote; its training goes on where it was.

    Parameters
    ----------
    path : path
    backend, threads
        As in `Sequential.compile`.
    dtype : str, optional
        Instead of the file's. Without it a file of ``mixed_bfloat16`` computes in float32 where the back end has no
        bfloat16 (`Sequential.explain` says so): its parameters are float32.

    Raises
    ------
    ModelFileError
        The file is truncated, foreign, or does not fit its own description.
    BackendUnavailable
        The back end or the dtype that was asked for cannot run here.
    """
    Settings.checked(None, "adam", backend, threads, dtype or "float32", True)  # the caller's, not the file's
    tensors, description, version = checkpoint.read(path)
    try:
        snapshot = Snapshot.from_description(description, tensors, version, backend, threads, dtype)
    except BackendUnavailable:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelFileError(f"{os.fspath(path)}: the model does not fit its description: {error}") from error
    return Sequential._restored(snapshot)
