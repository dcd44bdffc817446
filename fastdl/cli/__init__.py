"""The command line: ``train`` a net on the digits or on a table, ``predict`` with a saved one, ``info``, ``cubins``.

Mistakes of the caller end in one line on stderr and exit status 1 (2 for the command line itself, 130 for Ctrl-C), as
does a training that diverges: then nothing is saved.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence

from fastdl._version import __version__
from fastdl.cli import info, predict, train
from fastdl.cli.output import close_outputs, tell
from fastdl.errors import FastdlError

#: Threads are counted in a C int.
MOST_THREADS = 2**31 - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    longest = csv.field_size_limit(2**31 - 1)  # cells of free text; 131,072 letters by default
    try:
        options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be told
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has seen enough
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(f"not enough memory; {error}" if str(error) else "not enough memory")
    except (FastdlError, ValueError, OverflowError) as error:
        return _fail(str(error))
    finally:
        csv.field_size_limit(longest)
        close_outputs()
    return 0


def _fail(message: str, status: int = 1) -> int:
    tell(message)
    return status


def _threads(text: str) -> int | str:
    if text == "auto":
        return text
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and 0 < int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"expected auto or an integer from 1 to {MOST_THREADS}, found {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastdl", description="Dense neural networks, trained by compiled kernels."
    )
    parser.add_argument("--version", action="version", version=f"fastdl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{train,predict,info,cubins}")
    show = argparse.ArgumentDefaultsHelpFormatter
    for name, run, add_options, text in (
        ("train", train.run, train.add_options, "train a net and test it on held-out rows"),
        ("predict", predict.run, predict.add_options, "apply a net that train --save wrote"),
        ("info", info.run, info.add_options, "version, SIMD level, threads and back ends, and why"),
        (
            "cubins",
            info.run_cubins,
            info.add_cubins_options,
            "compile the CUDA kernels, without a GPU; they join the next wheel",
        ),
    ):
        command = commands.add_parser(name, help=text, formatter_class=show)
        command.set_defaults(run=run)
        add_options(command)
        if name in ("train", "predict"):
            command.add_argument("--backend", default="auto", help="auto, cython, numba, numpy or cuda")
            command.add_argument("--threads", type=_threads, default="auto", help="auto, or a number")
    return parser
