"""What a net is: layers, settings, state, tensors, files. `fastdl.model` is what it does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from fastdl import describe, losses, optimizers
from fastdl.builder import Builder, named
from fastdl.checks import flag, settings_fit, whole
from fastdl.errors import TrainingInProgress
from fastdl.inputs import feature_names, whole_number
from fastdl.kernels import dispatch
from fastdl.layers.base import Layer
from fastdl.program import Program
from fastdl.run import checkpoint
from fastdl.run.executor import Run
from fastdl.run.lock import NetLocks
from fastdl.run.placement import Bound
from fastdl.run.runtime import Runtime
from fastdl.run.settings import Settings
from fastdl.run.state import TrainState
from fastdl.run.weights import Weights
from fastdl.snapshot import Snapshot, read


class Net:
    """Layers with settings, state and tensors; base of `fastdl.Sequential`."""

    def __init__(self, layers: Sequence[Layer], seed: int = 0) -> None:
        if isinstance(layers, Layer) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected layers in a list, found {layers!r}")
        self._layers = tuple(layers)
        seen: set[int] = set()
        for layer in self._layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"expected layers from fastdl.layers, found {layer!r}")
            if id(layer) in seen:
                raise ValueError(
                    f"layers: expected each layer once, found {layer!r} twice; make a layer for each place"
                )
            seen.add(id(layer))
        self._pairs = named(self._layers)
        self._seed = whole(seed, "seed", 64)
        self._feature_names: list[str] | None = None
        self.extra: dict[str, Any] = {}  #: whatever was handed to `save` with the model
        self._state = TrainState()
        self._settings = Settings()
        self._runtime: Runtime | None = None
        self._last: tuple[Bound, Run] | None = None  # of forward(), for backward()
        self._locks = NetLocks()

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
        for layer in self._layers:
            settings_fit(layer, np.dtype(settings.float))
        with self._locks.memory:
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
        with self._locks.memory:
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
            self._runtime = Runtime(builder, self._settings, self._locks)
            self._feature_names = feature_names(X)
        return self._runtime

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, which are fixed."""
        return self._layers

    @property
    def names(self) -> list[str]:
        """Names of the layers: ``dense_0``, ..."""
        return [name for name, _ in self._pairs]

    @property
    def seed(self) -> int:
        """Key of the random streams."""
        return self._seed

    @property
    def feature_names(self) -> list[str] | None:
        """Columns of the frame that the net was built with: other frames are taken by these names, in any order."""
        return self._feature_names

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
        self._not_while_another_thread_trains("step")
        self._state.step, self._state.rows = whole(value, "step"), 0

    @property
    def epoch(self) -> int:
        """Epochs finished: the next epoch's order of rows depends on it."""
        return self._state.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._not_while_another_thread_trains("epoch")
        self._state.epoch = whole(value, "epoch")

    def _not_while_another_thread_trains(self, quantity: str) -> None:
        """Its trainer would put its own count back."""
        training = self._locks.training
        if not training.acquire(blocking=False):
            raise TrainingInProgress(f"{quantity}: this net is training in another thread; assign it when fit is done")
        training.release()

    @property
    def lr(self) -> float:
        """Learning rate in use; an assignment holds from the next step, in `fit` from the next epoch."""
        return self._state.lr

    @lr.setter
    def lr(self, value: float) -> None:
        rate = optimizers.check_lr(value)
        if rate > np.finfo(self._settings.float).max:
            raise ValueError(f"lr: expected a rate that {self._settings.float} can hold, found {value!r}")
        self._state.lr = rate

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
        with self._locks.memory:
            return self._built().training_program()

    @property
    def weights(self) -> Weights:
        """Parameters and running statistics by name: reading copies out, assigning copies in."""
        runtime = self._built()
        return Weights(runtime.builder.names, lambda: runtime.memory, self._locks)

    @property
    def gradients(self) -> Weights:
        """Gradients of the last backward pass, by the parameters' names."""
        runtime = self._built()
        return Weights(list(runtime.builder.segments), lambda: runtime.memory, self._locks, gradients=True)

    def get_state(self) -> dict[str, np.ndarray]:
        """Copies of every parameter and running statistic."""
        with self._locks.memory:
            return dict(self.weights)

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `get_state` gave, or a part of it; when it raises, nothing has been written."""
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
        with self._locks.memory:
            return describe.explain(self._built(), self.program)

    def summary(self) -> str:
        """A table of the layers; printed and returned."""
        text = describe.summary(self._built())
        print(text)
        return text

    # ------------------------------------------------------------------ copies and files
    def clone(self) -> Self:
        """A new net of the same layers, seed and settings, with nothing learned."""
        with self._locks.memory:
            net = type(self)([copy.copy(layer) for layer in self._layers], self.seed)
            net._settings = self._settings
            net._state.lr = 0.0 if self.optimizer is None else self.optimizer.lr
        return net

    def _snapshot(self, moments: bool = True) -> Snapshot:
        with self._locks.memory:
            if self._locks.at_work:
                self._locks.refuse()
            if not isinstance(self.extra, Mapping):
                raise TypeError(f"extra: expected a mapping, found {type(self.extra).__name__}")
            runtime, state = self._runtime, copy.deepcopy(self._state)
            width = None if runtime is None else runtime.builder.width
            return Snapshot(
                layers=[copy.copy(layer) for layer in self._layers],
                seed=self._seed,
                width=width,
                settings=self._settings,
                state=state,
                tensors={} if runtime is None else read(runtime, moments, gradients=state.rows > 0),
                feature_names=copy.copy(self._feature_names),
                extra=copy.deepcopy(dict(self.extra)),
                attributes={name: value for name, value in vars(self).items() if name not in _OWN},
            )

    def __copy__(self) -> Self:
        return type(self)._restored(self._snapshot())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        snapshot = self._snapshot()
        return type(self)._restored(replace(snapshot, attributes=copy.deepcopy(snapshot.attributes, memo)))

    def __reduce__(self) -> tuple[Callable[[Snapshot], Self], tuple[Snapshot]]:
        return type(self)._restored, (self._snapshot(),)

    @classmethod
    def _restored(cls, snapshot: Snapshot) -> Self:
        """The net of a snapshot; a subclass's own ``__init__`` is not called, its attributes come with the snapshot."""
        net = cls.__new__(cls)
        Net.__init__(net, snapshot.layers, snapshot.seed)
        net._settings = snapshot.settings
        if snapshot.width is not None:
            net.build(snapshot.width)
            snapshot.write(net._runtime)
        net._state, net.extra, net._feature_names = snapshot.state, snapshot.extra, snapshot.feature_names
        vars(net).update(snapshot.attributes)
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
            if not isinstance(extra, Mapping):
                raise TypeError(f"extra: expected a mapping, found {type(extra).__name__}")
            description["extra"] = dict(extra)
        checkpoint.write(path, snapshot.tensors, description)

    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(repr(layer) for layer in self._layers)}], seed={self.seed})"


#: Attributes of every net; whatever else stands on one is its user's, and copied with it.
_OWN = frozenset(vars(Net([])))
