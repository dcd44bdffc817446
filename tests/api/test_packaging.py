"""Packaging: what a distribution holds, where it can be imported from, what a machine without a compiler is told."""

import importlib.metadata
import importlib.resources
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile

import pytest

import fastdl as fd

ROOT = pathlib.Path(__file__).resolve().parents[2]
POSIX = pytest.mark.skipif(os.name != "posix", reason="stand-in compilers are shell scripts")


@pytest.fixture(scope="module")
def builder():
    """What setup.py needs; an ordinary environment has it only while pip builds."""
    for name in ("setuptools", "Cython"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a source tree")


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree without anything built."""
    copy = tmp_path / "source"
    unwanted = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info", ".*")
    copy.mkdir()
    for name in ("fastdl", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def python(*arguments, cwd, timeout=300, **environment):
    """Run the interpreter; returns the exit status, stdout and stderr."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("FASTDL_", "PYTHONPATH", "CC", "CXX"))
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def search_path(site):
    """A folder, then this environment's packages; with ``-S``, its editable installs are not among them."""
    return os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])


# what a distribution holds


def test_one_version():
    assert fd.__version__ == importlib.metadata.version("fastdl-kernels")


@pytest.mark.parametrize(
    ("package", "name"), [("fastdl", "py.typed"), ("fastdl.data", "digits.npz"), ("fastdl.data", "DIGITS.md")]
)
def test_data_files(package, name):
    assert importlib.resources.files(package).joinpath(name).is_file()


def test_sdist_holds_every_source(builder, source, tmp_path):
    status, _, stderr = python("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    assert status == 0, stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(source).as_posix()
        for folder in ("fastdl", "kernels", "tests", "bench")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert wanted | {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyd", ".pyc"))]


def test_pure_wheel(builder, source, tmp_path):
    status, _, stderr = python("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), cwd=source, FASTDL_PURE="1")
    assert status == 0, stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {f"fastdl/{path.relative_to(source / 'fastdl').as_posix()}" for path in (source / "fastdl").rglob("*.py")}
    kernels = {f"fastdl/{path.relative_to(source).as_posix()}" for path in (source / "kernels").rglob("*.py")}
    data = {"fastdl/py.typed", "fastdl/data/digits.npz", "fastdl/data/DIGITS.md"}
    plain = {name for name in names if ".dist-info/" not in name}
    assert plain == modules | kernels | data
    assert any(name.endswith("licenses/LICENSE") for name in names)

    # and it runs, without compiled kernels, saying so
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import fastdl as fd; print(fd.__file__); print(fd.backends())"
    status, stdout, stderr = python("-S", "-c", code, cwd=tmp_path, PYTHONPATH=search_path(site))
    assert status == 0, stderr
    assert stdout.startswith(str(site))
    assert "FASTDL_PURE=1" in stdout
    assert "'numpy': 'available'" in stdout


# where it can be imported from


@pytest.mark.parametrize("place", ["the root", "elsewhere"])
def test_import_from(place, tmp_path):
    cwd = ROOT if place == "the root" else tmp_path
    status, stdout, stderr = python("-c", "import fastdl.kernels.registry as r; print(r.__name__)", cwd=cwd)
    assert (status, stdout) == (0, "fastdl.kernels.registry"), stderr


def test_source_tree_shadows_an_installed_package(source, tmp_path):
    """`pip install .`, then python in the root: fastdl/ is the source, its kernels are the installed ones."""
    site = tmp_path / "site"
    shutil.copytree(source / "fastdl", site / "fastdl")
    shutil.copytree(source / "kernels", site / "fastdl" / "kernels")
    code = "import fastdl, fastdl.kernels.registry; print(fastdl.__file__); print(fastdl.kernels.__file__)"
    status, stdout, stderr = python("-S", "-c", code, cwd=source, PYTHONPATH=search_path(site))
    assert status == 0, stderr
    package, kernels = stdout.splitlines()
    assert pathlib.Path(package).is_relative_to(source)
    assert pathlib.Path(kernels).is_relative_to(site)


def test_unbuilt_source_tree_says_what_to_run(source):
    status, _, stderr = python("-S", "-c", "import fastdl", cwd=source)
    assert status == 1
    assert stderr.splitlines()[-1].startswith("ImportError: fastdl is not built: run `pip install -e .`")


def test_kernels_is_no_top_level_package(source):
    status, _, stderr = python("-S", "-c", "import kernels", cwd=source)
    assert status == 1
    assert "fastdl.kernels" in stderr.splitlines()[-1]


# what a machine without a compiler is told


def stand_in(path, fails_on=""):
    """A compiler that fails when the command line or the source holds a text, and else does nothing."""
    path.write_text(
        "#!/bin/sh\n"
        f'text="$* $(for f in "$@"; do case "$f" in *.c|*.cpp) cat "$f";; esac; done)"\n'
        f'case "$text" in *"{fails_on}"*) exit 1;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@POSIX
@pytest.mark.parametrize(
    ("fails_on", "message"),
    [
        (None, r"no C compiler \(.*absent\) was found; install one: apt-get install gcc"),
        ("", r"the C compiler \(.*cc\) cannot build an empty program"),
        ("Python.h", r"Python\.h was not found in .*; install it: apt-get install python3-dev"),
    ],
)
def test_missing_tool_gives_one_line(builder, source, tmp_path, fails_on, message):
    compiler = str(tmp_path / "absent") if fails_on is None else stand_in(tmp_path / "cc", fails_on)
    cxx = stand_in(tmp_path / "c++", "nothing fails")
    status, _, stderr = python("setup.py", "-q", "build_ext", "--inplace", cwd=source, CC=compiler, CXX=cxx)
    assert status == 1
    assert len(stderr.splitlines()) == 1
    assert re.match(f"fastdl: {message}.*FASTDL_PURE=1", stderr), stderr


@POSIX
def test_missing_cxx_gives_one_line(builder, source, tmp_path):
    compiler = stand_in(tmp_path / "cc", "nothing fails")
    absent = str(tmp_path / "absent")
    status, _, stderr = python("setup.py", "-q", "build_ext", "--inplace", cwd=source, CC=compiler, CXX=absent)
    assert status == 1
    assert stderr.startswith(f"fastdl: no C++ compiler ({absent}) was found")
    assert len(stderr.splitlines()) == 1


@POSIX
@pytest.mark.parametrize("header", ["common/abi.h", "engine/crew.h", "activations/table.h", "losses/table.h"])
def test_a_family_alone_is_not_rebuilt_after_a_shared_header(builder, source, tmp_path, header):
    """The others would go on with another layout of what all of them share; a family's own header is its own."""
    others = ("activations", "batchnorm", "dense", "engine")
    for name in others:
        (source / "kernels" / name / f"_cython{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    late = time.time() + 60
    os.utime(source / "kernels" / header, (late, late))
    compilers = {name: stand_in(tmp_path / name, "nothing fails") for name in ("CC", "CXX")}
    build = ("setup.py", "-q", "build_ext", "--inplace")
    status, _, stderr = python(*build, cwd=source, FASTDL_FAMILIES="losses", **compilers)
    if header == "losses/table.h":
        assert "has changed since" not in stderr
        return
    assert status == 1
    message = f"fastdl: kernels/{header} has changed since (activations|batchnorm|dense|engine) was built"
    assert re.match(message, stderr.splitlines()[-1]), stderr
    assert "rebuild everything: python setup.py -q build_ext --inplace" in stderr


# the how-to of CONTRIBUTING.md


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.skipif(fd.backends()["cython"] != "available", reason="the compiled back end is not built")
def test_the_activation_in_contributing_builds_and_passes(builder, source):
    """Minutes: everything is compiled. What the registry makes of the new entry passes on all back ends."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S).group(1)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=source, check=True)
    status, _, stderr = python("setup.py", "-q", "build_ext", "--inplace", cwd=source, timeout=3000)
    assert status == 0, stderr
    command = ["-S", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "softsign"]
    folders = ["tests/contract", "tests/kernels", "tests/api/test_program.py"]
    path = search_path(source)  # this tree's kernels, not those of an editable install
    status, stdout, stderr = python(*command, *folders, cwd=source, timeout=3000, PYTHONPATH=path)
    assert status == 0, stdout + stderr
    assert int(re.search(r"(\d+) passed", stdout).group(1)) > 50
