"""Builds the extensions: one per op family, its C++ compiled once per SIMD level.

``FASTDL_PURE=1``          no extensions: NumPy and Numba back ends alone (``fd.backends()`` says so)
``FASTDL_FAMILIES=a,b``    build these folders of kernels/ alone (with ``build_ext --inplace``, while working on one)
``FASTDL_FLAGS="..."``     compiler and linker flags after all others (tests/sanitize.sh)

``CXX=clang++ python setup.py -q syntax`` asks another compiler about every C++ file at every level, and makes nothing.
"""

from __future__ import annotations

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = pathlib.Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
PURE = os.environ.get("FASTDL_PURE") == "1" or sys.platform == "win32"
# -g0: the interpreter's own flags often ask for debug information, which doubles the time and the size
# hidden: a module exports its PyInit function alone
CXX_FLAGS = ["-std=gnu++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
CXX_FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno"]
# gcc 12 sees uninitialised operands in every unmasked AVX-512 intrinsic
CXX_FLAGS += ["-fno-trapping-math", "-Wno-psabi", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
C_FLAGS = ["-O2", "-g0", "-fvisibility=hidden", "-w"]  # what Cython writes warns about qualifiers, and nobody reads it
MORE_FLAGS = os.environ.get("FASTDL_FLAGS", "").split()
AVX2_FLAGS = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
#: (name, number in kernels/common/level.h, flags)
LEVELS = [("portable", 0, [])]
if X86:
    LEVELS += [
        ("avx2", 1, [*AVX2_FLAGS, "-mprefer-vector-width=256"]),
        ("avx512", 2, [*AVX2_FLAGS, *AVX512_FLAGS, "-mprefer-vector-width=512"]),
    ]
#: What only some CPUs of the avx512 level have is a file of its own, with flags of its own.
SPECIAL = {"bfloat16.cpp": ["-mavx512bf16"], "amx.cpp": ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}
INCLUDE = ["kernels/common", "kernels"]
#: What several families read: a change of it is a change of all of them.
SHARED = ("common/*.h", "common/*.hpp", "common/*.pxi", "engine/*.h", "activations/table.h")
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}
INSTALL_COMPILER = "apt-get install gcc g++ python3-dev, or on macOS: xcode-select --install"


def stop(message: str) -> None:
    raise SystemExit(f"fastdl: {message} (or set FASTDL_PURE=1 to build without compiled kernels)")


def compiler(language: str) -> list[str]:
    """The command that setuptools will use for ``"C"`` or ``"C++"``."""
    name, fallback = ("CC", "cc") if language == "C" else ("CXX", "c++")
    return (os.environ.get(name) or sysconfig.get_config_var(name) or fallback).split()


def builds(source: str, flags: list[str], language: str = "C") -> bool:
    """Whether a small program compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "probe.c" if language == "C" else "probe.cpp")
        path.write_text(source)
        command = [*compiler(language), str(path), "-o", str(path.with_suffix("")), *flags]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def check_tools() -> None:
    """Stop with one line if a compiler or Python's headers are missing."""
    for language in ("C", "C++"):
        command = compiler(language)[0]
        if shutil.which(command) is None:
            stop(f"no {language} compiler ({command}) was found; install one: {INSTALL_COMPILER}")
        if not builds("int main(void) { return 0; }\n", [], language):
            stop(f"the {language} compiler ({command}) cannot build an empty program; reinstall it: {INSTALL_COMPILER}")
    include = sysconfig.get_path("include")
    if not builds("#include <Python.h>\nint main(void) { return 0; }\n", [f"-I{include}"]):
        stop(f"Python.h was not found in {include}; install it: apt-get install python3-dev")


def sources(pattern: str) -> list[str]:
    """Files of kernels/, relative to the root."""
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(f"kernels/{pattern}"))]


def families() -> list[str]:
    """Folders of kernels/ that have a ``_cython.pyx``."""
    return [path.split(os.sep)[1] for path in sources("*/_cython.pyx")]


def extensions() -> list[Extension]:
    """One extension per family, or those of ``FASTDL_FAMILIES``."""
    if PURE:
        print("fastdl: building without compiled kernels", file=sys.stderr)
        return []
    chosen = os.environ.get("FASTDL_FAMILIES")
    names = chosen.split(",") if chosen else families()
    return [
        Extension(
            f"fastdl.kernels.{name}._cython",
            [f"kernels/{name}/_cython.pyx"],
            include_dirs=INCLUDE,
            depends=[
                *sources(f"{name}/native.cpp"),
                *(path for special in SPECIAL for path in sources(f"{name}/{special}")),
                *sources("*/*.h"),
                *sources("*/*.hpp"),
                *sources("*/*.pxi"),
            ],
        )
        for name in names
    ]


class BuildLevels(build_ext):
    """Cython first, then every family's native.cpp once per level, then each module with its levels' objects."""

    def finalize_options(self) -> None:
        modules = self.distribution.ext_modules
        if modules:
            from Cython.Build import cythonize

            check_tools()
            for ext in modules:
                ext.extra_compile_args = [*C_FLAGS, "-pthread", *MORE_FLAGS]
                ext.extra_link_args = ["-pthread", "-lc++" if sys.platform == "darwin" else "-lstdc++", *MORE_FLAGS]
            self.distribution.ext_modules = cythonize(
                modules, compiler_directives=DIRECTIVES, build_dir="build/cython", quiet=True
            )
        super().finalize_options()
        self.check_others()
        if self.parallel is None:
            self.parallel = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def build_extensions(self) -> None:
        with ThreadPoolExecutor(self.parallel) as pool:
            pending = [(ext, pool.submit(self.compile_level, ext, *level)) for ext in self.stale() for level in LEVELS]
            for ext, objects in pending:
                ext.extra_objects = [*ext.extra_objects, *objects.result()]
        super().build_extensions()

    def check_others(self) -> None:
        """Stop where families that are not built now would be left with another layout of what all of them share."""
        built_now = {ext.name for ext in self.distribution.ext_modules or ()}
        others = [name for name in families() if f"fastdl.kernels.{name}._cython" not in built_now]
        shared = [path for pattern in SHARED for path in sources(pattern)]
        for name in others if built_now else ():
            module = self.get_ext_fullpath(f"fastdl.kernels.{name}._cython")
            newer = [path for path in shared if os.path.exists(module) and newer_group([path], module)]
            if newer:
                raise SystemExit(
                    f"fastdl: {newer[0]} has changed since {name} was built, which FASTDL_FAMILIES leaves out; "
                    "rebuild everything: python setup.py -q build_ext --inplace"
                )

    def stale(self) -> list[Extension]:
        """Extensions with a native.cpp that are older than one of their sources or headers."""
        return [
            ext
            for ext in self.extensions
            if any(path.endswith("native.cpp") for path in ext.depends)
            and (self.force or newer_group([*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name), "newer"))
        ]

    def compile_level(self, ext: Extension, name: str, number: int, flags: list[str]) -> list[str]:
        native = [path for path in ext.depends if path.endswith("native.cpp")]
        objects = self.compile(ext, name, number, flags, native)
        if name == "avx512":
            for special, more in SPECIAL.items():
                files = [path for path in ext.depends if path.endswith(f"/{special}")]
                objects += self.compile(ext, name, number, [*flags, *more], files)
        return objects

    def compile(self, ext: Extension, name: str, number: int, flags: list[str], files: list[str]) -> list[str]:
        return self.compiler.compile(
            files,
            output_dir=os.path.join(self.build_temp, name),
            macros=[("FD_LEVEL", str(number))],
            include_dirs=ext.include_dirs,
            extra_postargs=[*CXX_FLAGS, *flags, *MORE_FLAGS],
        )


class CheckSyntax(Command):
    """Every C++ file at every level through the front end of ``CXX``: what one compiler takes another may refuse."""

    description = "check the C++ files with the compiler CXX, without making anything"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        units = [(path, number, flags) for path in sources("*/native.cpp") for _, number, flags in LEVELS]
        if X86:
            _, number, flags = LEVELS[-1]
            units += [(path, number, [*flags, *more]) for s, more in SPECIAL.items() for path in sources(f"*/{s}")]
        refused = 0
        for path, number, flags in units:
            options = ["-fsyntax-only", f"-DFD_LEVEL={number}", *(f"-I{folder}" for folder in INCLUDE)]
            command = [*compiler("C++"), *options, *CXX_FLAGS, *flags, path]
            refused += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
        print(f"{compiler('C++')[0]}: {len(units) - refused} of {len(units)} translation units are sound")
        if refused:
            raise SystemExit(1)


setup(
    packages=[
        *find_packages(include=["fastdl", "fastdl.*"]),
        "fastdl.kernels",
        *(f"fastdl.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastdl.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLevels, "syntax": CheckSyntax},
)
