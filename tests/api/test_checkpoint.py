"""Model files: what is written comes back, what is broken is refused by name, a crash leaves the old file."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from fastdl.errors import FastdlError, ModelFileError
from fastdl.run import checkpoint

DESCRIPTION = {"layers": [{"type": "Dense", "units": 3}], "seed": 7, "nothing": None}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "dense_0/kernel": rng.standard_normal((5, 3)).astype(np.float32),
        "dense_0/bias": rng.standard_normal(3),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": rng.standard_normal((4, 6)).T,
        "strided": np.arange(20.0)[::3],
    }


@pytest.fixture
def path(tmp_path, tensors):
    path = tmp_path / "net.safetensors"
    checkpoint.write(path, tensors, DESCRIPTION)
    return path


def test_round_trip(path, tensors):
    read, description, version = checkpoint.read(path)
    assert version == checkpoint.VERSION
    assert description == DESCRIPTION
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == np.shape(value)
        np.testing.assert_array_equal(read[name], value)
        assert read[name].flags.writeable


def test_other_tools_can_read_it(path, tensors):
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["transposed"], tensors["transposed"])


def test_only_the_file_is_left(path, tensors):
    checkpoint.write(path, tensors, DESCRIPTION)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_usual_permissions(path):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_failure_keeps_the_old_file(path, tensors, monkeypatch):
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, {"other": np.zeros(3)}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights there")
def test_link_is_followed(path, tensors):
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    checkpoint.write(link, {"w": np.ones(2)}, {"new": True})
    assert link.is_symlink()
    assert checkpoint.read(path)[1] == {"new": True}


def test_description_must_be_json(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path / "x", {}, {"fn": print})
    assert os.listdir(tmp_path) == []


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            checkpoint.read(path)


def test_damage_is_refused(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match="damaged"):
        checkpoint.read(path)


def test_noise_is_refused(tmp_path):
    path = tmp_path / "noise"
    rng = np.random.default_rng(1)
    for content in (b"not a model", rng.bytes(1000), b"\x10" + bytes(500), b"PK\x03\x04" + rng.bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ModelFileError):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"fastdl": "{"}, {"fastdl": "3"}, {"fastdl": '{"version": 1}'}]
)
def test_foreign_file_is_refused(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3)}, path, metadata)
    with pytest.raises(ModelFileError, match=r"not a model saved by fastdl|cannot be read"):
        checkpoint.read(path)


def test_other_version_is_refused(tmp_path):
    path = tmp_path / "future.safetensors"
    header = {"version": checkpoint.VERSION + 1, "sha256": "", "description": {}}
    safetensors.numpy.save_file({"w": np.ones(3)}, path, {checkpoint.KEY: json.dumps(header)})
    with pytest.raises(ModelFileError, match=f"version {checkpoint.VERSION + 1}"):
        checkpoint.read(path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "absent")


def test_error_types():
    assert issubclass(ModelFileError, ValueError)
    assert issubclass(ModelFileError, FastdlError)


def test_digest_depends_on_values_and_order_of_names_only():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2)
    assert checkpoint.digest({"a": a, "b": b}) == checkpoint.digest({"b": b, "a": np.asfortranarray(a)})
    assert checkpoint.digest({"a": a, "b": b}) != checkpoint.digest({"a": a, "b": -b})
    assert checkpoint.digest({"a": a.astype(">f4")}) == checkpoint.digest({"a": a})
    assert checkpoint.digest({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
