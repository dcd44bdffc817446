"""Where a team of threads must meet: hazards between the calls of a Program, from the byte ranges that they touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdl.program import Call

#: First byte and the one after the last.
Range = tuple[int, int]


def after_which_to_meet(
    calls: Sequence[Call], touched: Callable[[range], tuple[list[Range], list[Range]]]
) -> list[bool]:
    """After which heads the team must meet: where a later chain touches what an earlier one may still work on.

    Parameters
    ----------
    calls : sequence of Call
    touched : callable
        ``touched(chain) -> (read, written)``: byte ranges of a head and its tails.
    """
    barriers = [False] * len(calls)
    read: list[Range] = []
    written: list[Range] = []
    heads = [k for k, call in enumerate(calls) if not call.tail]
    for before, k, end in zip([-1, *heads], heads, [*heads[1:], len(calls)], strict=False):
        r, w = touched(range(k, end))
        if _overlap(r, written) or _overlap(w, written) or _overlap(w, read) or _new_phase(calls, k):
            barriers[before] = True
            read, written = [], []
        read += r
        written += w
    barriers[heads[-1]] = True
    return barriers


def _overlap(a: list[Range], b: list[Range]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)


def _new_phase(calls: Sequence[Call], k: int) -> bool:
    return k > 0 and calls[k].phase != calls[k - 1].phase
