"""Epochs over a data set that does not fit into GPU memory: batches through two pinned buffers.

While the GPU works on one batch, the host gathers the next one into the other pinned buffer and a stream of its own
copies it down. The host waits for nothing but the step before last, which has read the buffer that it fills. Order of
rows, masks and results are those of a data set in GPU memory, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdl.cuda.executor import CudaExecutor
from fastdl.cuda.mirror import Pool
from fastdl.kernels import registry
from fastdl.kernels.common.gpu import View
from fastdl.program import Buffer
from fastdl.run.executor import Run
from fastdl.run.placement import Bound

#: Share of the free memory that a data set may take: the rest is for other batch sizes, prediction and validation.
SHARE = 0.8


def fits(device: Any, *arrays: np.ndarray | None) -> bool:
    """Whether a data set has room in GPU memory; what lies there already has."""
    size = sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))
    return size <= SHARE * device.free_bytes()


@dataclass
class Half:
    """One of the two buffers: host memory that the copy engine reads, its copy, and the step that reads that."""

    pinned: list[np.ndarray]
    views: list[View]
    read: Any = None  # event: the copy may be overwritten


class Staged:
    """What `fastdl.run.trainer.Trainer` asks of an executor, for arrays of the host.

    Parameters
    ----------
    bound : Bound
        A training step that is fed single batches.
    x, targets, weight : array
    batch : int
    shuffle : bool
    seed : int
        Of the model, for the epochs' permutations.
    """

    def __init__(
        self, bound: Bound, x: np.ndarray, targets: np.ndarray, weight: np.ndarray | None, batch: int, shuffle: bool,
        seed: int,
    ) -> None:  # fmt: skip
        self.executor: CudaExecutor = bound.executor
        self.totals = self.executor.totals
        self._sources = [a for a in (x, targets, weight) if a is not None]
        self._slots: list[Buffer] = [b for b in (bound.x, bound.targets, bound.weight) if b is not None]
        self._shuffle, self._seed = shuffle, seed
        device = self.executor.device
        pool = Pool(self, device)
        self._halves = []
        for _ in range(2):
            shapes = [(batch, *a.shape[1:]) for a in self._sources]
            pinned = [device.pinned(shape, a.dtype) for shape, a in zip(shapes, self._sources, strict=True)]
            views = [View(pool.allocate(p.nbytes), p.shape, int(np.prod(p.shape[1:])), p.dtype) for p in pinned]
            self._halves.append(Half(pinned, views))
        self._order: tuple[int, np.ndarray] | None = None  # epoch and its permutation

    def _rows(self, epoch: int, count: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(count)
            if self._shuffle:
                reference = registry.find("epoch_indices", "numpy").fn
                reference(order, n=count, seed=self._seed, epoch=epoch, offset=0)
            self._order = epoch, order
        return self._order[1]

    growth = 4  # times the steps of a slice that the next one may have: the first one waits for no buffer

    @contextlib.contextmanager
    def epoch(self, run: Run, count: int, batch: int) -> Iterator[None]:
        try:
            with self.executor.epoch(run, count, batch):
                yield
        finally:
            for half in self._halves:
                self._wait_for(half)

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        device, order = self.executor.device, self._rows(run.epoch, count)
        for _ in range(steps):
            half, index = self._halves[0], order[run.offset : run.offset + batch]
            self._halves.reverse()
            self._wait_for(half)
            for source, pinned, view in zip(self._sources, half.pinned, half.views, strict=True):
                filled = np.take(source, index, axis=0, out=pinned[: len(index)])
                device.copy_down(view.address, filled)
            device.copied()
            for slot, view in zip(self._slots, half.views, strict=True):
                self.executor.place(slot, view)
            self.executor.replay_step(len(index))
            half.read = device.mark()
            run.step += 1
            run.update += 1
            run.offset += len(index)

    def _wait_for(self, half: Half) -> None:
        """Until no step reads a buffer any more."""
        if half.read is not None:
            self.executor.device.wait(half.read)
            half.read = None
