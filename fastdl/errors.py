"""Errors that a caller may want to tell apart; each is also the built-in error that fits."""

from __future__ import annotations


class FastdlError(Exception):
    """Base of fastdl's own errors."""


class BackendUnavailable(FastdlError, RuntimeError):
    """A back end was asked for that cannot run here; the message says why."""


class NetAtWork(FastdlError, RuntimeError):
    """A net was called in the middle of its own work, by a signal handler or a finalizer."""


class TrainingInProgress(FastdlError, RuntimeError):
    """A net was asked to move to other memory while it is training."""


class ModelFileError(FastdlError, ValueError):
    """A model file is truncated, damaged, foreign, or of another version."""


class DataError(FastdlError, ValueError):
    """A data file cannot be used as it stands; the message names the row and the column."""
