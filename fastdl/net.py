"""What a net is: layers, settings, state, tensors, files. `fastdl.model` is what it does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from fastdl import describe, losses, optimizers
from fastdl.builder import Builder, named
from fastdl.checks import flag, settings_fit, whole
from fastdl.inputs import feature_names, whole_number
from fastdl.kernels import dispatch
from fastdl.layers.base import Layer
from fastdl.program import Program
from fastdl.run import checkpoint
from fastdl.run.executor import Run
from fastdl.run.lock import NetLock
from fastdl.run.placement import Bound
from fastdl.run.runtime import Runtime
from fastdl.run.settings import Settings
from fastdl.run.state import TrainState
from fastdl.run.weights import Weights
from fastdl.snapshot import Snapshot


class Net:
    """Layers with settings, state and tensors; base of `fastdl.Sequential`."""

    def __init__(self, layers: Sequence[Layer], seed: int = 0) -> None:
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected layers in a list, found {layers!r}")
        self.layers: list[Layer] = list(layers)
        for k, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"expected layers from fastdl.layers, found {layer!r}")
            if any(layer is other for other in self.layers[:k]):
                raise ValueError(
                    f"layers: expected each layer once, found {layer!r} twice; make a layer for each place"
                )
        self._pairs = named(self.layers)
        self.names: list[str] = [name for name, _ in self._pairs]  #: of the layers: ``dense_0``, ...
        self.seed = whole(seed, "seed", 64)
        #: columns of the frame that the net was built with: other frames are taken by these names, in any order
        self.feature_names: list[str] | None = None
        self.extra: dict[str, Any] = {}  #: whatever was handed to `save` with the model
        self._state = TrainState()
        self._settings = Settings()
        self._runtime: Runtime | None = None
        self._last: tuple[Bound, Run] | None = None  # of forward(), for backward()
        self._training = NetLock()  # held by a whole training; its depth counts those of `fit`
        self._lock = NetLock()  # held while somebody is at the memory; a training lets go between slices

    # ------------------------------------------------------------------ set-up
    def compile(
        self,
        loss: str | losses.Loss | None = None,
        optimizer: str | optimizers.Optimizer = "adam",
        backend: str = "auto",
        threads: int | str = "auto",
        dtype: str = "float32",
        fuse: bool = True,
    ) -> Self:
        """Choose how to train; returns the model.

        Parameters, running statistics, `step` and `epoch` stay, so that masks and epochs go on; the optimiser's moments
        and the learning rate start anew.

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
        TrainingInProgress
            When this net is training at the moment.
        """
        settings = Settings.checked(loss, optimizer, backend, threads, dtype, fuse)
        for layer in self.layers:
            settings_fit(layer, np.dtype(settings.float))
        with self._lock:
            if self._runtime is not None:
                if settings.dtype != self._settings.dtype:
                    raise ValueError(
                        f"dtype: this model is built with {self._settings.dtype}, found {settings.dtype}; make a new "
                        "model"
                    )
                self._runtime.compile(settings)
            self._settings, self._last = settings, None
            self._state.lr, self._state.update, self._state.rows = settings.optimizer.lr, 0, 0
        return self

    def build(self, width: int) -> Self:
        """Fix the number of input features and draw the initial weights; `fit` and `predict` do it by themselves."""
        with self._lock:
            self._built(self._builder(whole_number(width, "input features")))
        return self

    def _builder(self, width: int) -> Builder:
        """The model on paper, for so many features. Nothing is built yet, so that bad data can still be refused."""
        if self._runtime is None:
            return Builder(self._pairs, width, self.seed, self._settings.dtype)
        if self._runtime.builder.width != width:
            raise ValueError(f"expected {self._runtime.builder.width} features, as this model was built, found {width}")
        return self._runtime.builder

    def _built(self, builder: Builder | None = None, X: Any = None) -> Runtime:
        """The runtime; made from what `_builder` gave for X if there is none yet."""
        if self._runtime is None:
            if builder is None:
                raise ValueError(
                    "the model does not know its input yet: call fit(), predict() or build(features) first"
                )
            self._runtime = Runtime(builder, self._settings, self._training)
            self.feature_names = feature_names(X)
        return self._runtime

    @property
    def loss(self) -> losses.Loss | None:
        return self._settings.loss

    @property
    def optimizer(self) -> optimizers.Optimizer | None:
        return self._settings.optimizer

    @property
    def step(self) -> int:
        """Training steps taken: the position in the random streams of dropout. Assign to go elsewhere."""
        return self._state.step

    @step.setter
    def step(self, value: int) -> None:
        self._state.step, self._state.rows = whole(value, "step"), 0

    @property
    def epoch(self) -> int:
        """Epochs finished: the next epoch's order of rows depends on it."""
        return self._state.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._state.epoch = whole(value, "epoch")

    @property
    def lr(self) -> float:
        """Learning rate in use; an assignment holds from the next step, in `fit` from the next epoch."""
        return self._state.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._state.lr = optimizers.check_lr(value)

    @property
    def stop_training(self) -> bool:
        """Set to True by a callback to end `fit` after the epoch."""
        return self._state.stop

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        self._state.stop = flag(value, "stop_training")

    def layer(self, name: str) -> Layer:
        """The layer of a name in `names`."""
        for known, layer in self._pairs:
            if known == name:
                return layer
        raise KeyError(f"no layer {name!r}; the model has {', '.join(self.names)}")

    # ------------------------------------------------------------------ what is inside
    @property
    def backend(self) -> str:
        """Back end that the next call runs on."""
        return self._built().wanted()

    @property
    def threads(self) -> int:
        """Threads of a training step."""
        return self._built().threads(self.program)[0]

    @property
    def program(self) -> Program:
        """The training Program (or the user's loop, without a loss) of the last batch size, or of 32 rows."""
        with self._lock:
            return self._built().training_program()

    @property
    def weights(self) -> Weights:
        """Parameters and running statistics by name: reading copies out, assigning copies in."""
        runtime = self._built()
        return Weights(runtime.builder.names, lambda: runtime.memory, self._lock)

    @property
    def gradients(self) -> Weights:
        """Gradients of the last backward pass, by the parameters' names."""
        runtime = self._built()
        return Weights(list(runtime.builder.segments), lambda: runtime.memory, self._lock, gradients=True)

    def get_state(self) -> dict[str, np.ndarray]:
        """Copies of every parameter and running statistic."""
        with self._lock:
            return dict(self.weights)

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `get_state` gave, all of it or, when it raises, nothing."""
        self.weights.assign(state)

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
        dispatch.load_cuda()
        from fastdl.cuda import dry

        return dry.plan(self._built().builder, self._settings, batch_size)

    def explain(self) -> str:
        """Which back end runs this model with how many threads, and why not another."""
        with self._lock:
            return describe.explain(self._built(), self.program)

    def summary(self) -> str:
        """A table of the layers; printed and returned."""
        text = describe.summary(self._built())
        print(text)
        return text

    # ------------------------------------------------------------------ copies and files
    def clone(self) -> Self:
        """A new net of the same layers, seed and settings, with nothing learned."""
        with self._lock:
            net = type(self)([copy.copy(layer) for layer in self.layers], self.seed)
            net._settings = self._settings
            net._state.lr = 0.0 if self.optimizer is None else self.optimizer.lr
        return net

    def _snapshot(self, moments: bool = True) -> Snapshot:
        with self._lock:
            runtime = self._runtime
            tensors = {} if runtime is None else Snapshot.read(runtime.memory, runtime.builder.names, moments)
            width, state = None if runtime is None else runtime.builder.width, copy.deepcopy(self._state)
            layers = [copy.copy(layer) for layer in self.layers]
            names, extra = copy.copy(self.feature_names), copy.deepcopy(self.extra)
            return Snapshot(layers, self.seed, width, self._settings, state, tensors, names, extra)

    def __copy__(self) -> Self:
        return type(self)._restored(self._snapshot())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)._restored(self._snapshot())

    def __reduce__(self) -> tuple[Callable[[Snapshot], Self], tuple[Snapshot]]:
        return type(self)._restored, (self._snapshot(),)

    @classmethod
    def _restored(cls, snapshot: Snapshot) -> Self:
        """The net of a snapshot."""
        net = cls(snapshot.layers, snapshot.seed)
        net._settings = snapshot.settings
        if snapshot.width is not None:
            net.build(snapshot.width)
            net.set_state(snapshot.weights)
            snapshot.write_moments(net._runtime.memory)
        net._state, net.extra, net.feature_names = snapshot.state, snapshot.extra, snapshot.feature_names
        return net

    def save(
        self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None, optimizer: bool = True
    ) -> None:
        """Write architecture, weights and what the optimiser remembers to a safetensors file, in one atomic step.

        Parameters
        ----------
        path : path
        extra : mapping, optional
            JSON values that come back as ``extra`` of the loaded model.
        optimizer : bool
            False leaves the optimiser's moments out, two thirds of the file under Adam: a net that is loaded from it
            trains with fresh ones.

        Raises
        ------
        ValueError
            A setting or ``extra`` cannot be written as JSON; nothing is written then.
        OSError
        """
        self._built()
        snapshot = self._snapshot(optimizer)
        description = snapshot.describe()
        if extra is not None:
            description["extra"] = dict(extra)
        checkpoint.write(path, snapshot.tensors, description)

    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(repr(layer) for layer in self.layers)}], seed={self.seed})"
