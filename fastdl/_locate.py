"""Finds ``fastdl.kernels`` when a source tree shadows the installed package.

The folder ``kernels/`` of the source tree is installed as ``fastdl.kernels``. Run from the repository root after
``pip install .``, Python imports the source folder ``fastdl/``, which has no ``kernels`` inside: then the built kernels
are looked for in ``../kernels`` (built in place) and in the other entries of ``sys.path`` (installed).
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys

_NAME = "fastdl.kernels"


def _is_built(folder: pathlib.Path) -> bool:
    if not (folder / "__init__.py").is_file():
        return False
    return any(folder.glob("engine/_cython*.so")) or any(folder.glob("engine/_cython*.pyd")) or _is_pure(folder)


def _is_pure(folder: pathlib.Path) -> bool:
    """An installed package without extensions was built so on purpose; a bare source tree was not built at all."""
    return folder.parent.name == "fastdl"


def _candidates() -> list[pathlib.Path]:
    here = pathlib.Path(__file__).resolve().parent
    return [here.parent / "kernels", *(pathlib.Path(p or ".").resolve() / "fastdl" / "kernels" for p in sys.path)]


def locate() -> None:
    """Make ``import fastdl.kernels`` work, or say in one line what to run."""
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return
    for folder in _candidates():
        if _is_built(folder):
            init = folder / "__init__.py"
            spec = importlib.util.spec_from_file_location(_NAME, init, submodule_search_locations=[str(folder)])
            module = importlib.util.module_from_spec(spec)
            sys.modules[_NAME] = module
            spec.loader.exec_module(module)
            sys.modules["fastdl"].kernels = module
            return
    raise ImportError(
        "fastdl is not built: run `pip install -e .` in the source tree (FASTDL_PURE=1 to do without a compiler)"
    )


locate()
