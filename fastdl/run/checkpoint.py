"""Model files: safetensors, with a description of the net as JSON in the header's metadata.

A file is replaced in one step: it is written under another name in the same folder, flushed to the disk, and renamed.
A crash leaves the old file or the new one, never a half. Nothing is pickled, so reading a file runs no code of its
author.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdl.errors import ModelFileError

#: Raised when a file of today could no longer be read as it was meant; older ones are read. 2: what the optimiser
#: remembers and how far the training has come.
VERSION = 2
KEY = "fastdl"


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the values in the order of their names, row by row, little-endian."""
    import hashlib  # here, as json below: `import fastdl` should cost little more than NumPy

    sha = hashlib.sha256()
    for name in sorted(tensors):
        values = np.asarray(tensors[name])
        sha.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
    """Write a model file.

    Parameters
    ----------
    path : path
        A symbolic link is followed: the file that it points to is replaced.
    tensors : mapping name -> array
    description : mapping
        Whatever rebuilds the net; it must survive a round trip through JSON.

    Raises
    ------
    ValueError, TypeError
        The description is no JSON, or too long; nothing has been written then.
    OSError
    """
    import safetensors.numpy

    header = {"version": VERSION, "sha256": digest(tensors), "description": description}
    # safetensors copies the memory as it lies, so every array must be dense and in row order
    dense = {name: np.require(value, requirements="C") for name, value in tensors.items()}
    try:
        text = as_json(header)
        data = safetensors.numpy.save(dense, {KEY: text})
    except safetensors.SafetensorError as error:  # its header has 100 MB at most
        raise ValueError(f"{os.fspath(path)}: a description of {len(text):,} letters does not fit: {error}") from None
    except RecursionError:
        raise ValueError(f"{os.fspath(path)}: the description is nested too deep to be written") from None
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: the description cannot be written as JSON: {error}") from None

    target, temporary = _places(path)
    try:
        # "x": the usual permissions of a new file, which tempfile would narrow to the owner
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def as_json(value: Any) -> str:
    """JSON as a file keeps it: a letter takes 2 or 3 bytes, where an escape within the header's own JSON takes 7."""
    import json

    text = json.dumps(value, allow_nan=False, default=_plain, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair has no bytes of its own


def _plain(value: Any) -> Any:
    """NumPy's scalars as JSON has them."""
    if isinstance(value, np.longdouble):  # whose item() is one again
        return float(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written to a model file as JSON")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that `write` would meet, before a training of hours: a file is made beside, and removed."""
    _, temporary = _places(path)
    try:
        with open(temporary, "xb"):
            pass
        temporary.unlink()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None


def _places(path: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """The file that a path means, and one beside it to write first."""
    name, target = os.fspath(path), pathlib.Path(os.path.realpath(path))
    if not name or target.is_dir() or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "a file name is needed, this is a folder", name)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", name)
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "no regular file; it would be replaced", name)
    return target, target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")


def _sync_folder(folder: pathlib.Path) -> None:
    """Make the rename itself durable. Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Read a model file.

    Returns
    -------
    tensors : dict name -> array
    description : dict
    version : int
        Of the file.

    Raises
    ------
    ModelFileError
        The file is truncated, damaged, not a model of fastdl, or of another version.
    OSError
        The file cannot be opened.
    """
    import json

    import safetensors

    name = os.fspath(path)
    with open(path, "rb"):  # a missing file is no broken one
        pass
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: np.array(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{name}: not a safetensors file, or a truncated one ({error})") from None
    if KEY not in metadata:
        raise ModelFileError(
            f"{name}: a safetensors file, but not a model saved by fastdl (no {KEY!r} in its metadata)"
        )
    try:
        header = json.loads(metadata[KEY])
        version, expected, description = header["version"], header["sha256"], header["description"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{name}: the description of the net cannot be read ({error})") from None
    if version not in range(1, VERSION + 1):
        raise ModelFileError(f"{name}: file version {version}, this fastdl reads versions 1 to {VERSION}")
    if digest(tensors) != expected:
        raise ModelFileError(f"{name}: the weights do not match their checksum: the file is damaged")
    return tensors, description, version
