"""A stream as layers: a row of letters, one or more for each sublayer, cut where it repeats.

The letters: M self attention, X cross attention, F feed-forward, C convolution, P pooling, L other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MIXERS = "MLCP"
ATTENTION = frozenset("MX")
LONGEST = 8  # sublayers of a layer, where one is looked for in a stream that is not quite periodic


def cut(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Half-open ranges of blocks: the longest periodic run of least period, with attention where there is any; else a
    block for each mixer.

    >>> cut("MFMF"), cut("CMXFMXF"), cut("MF"), cut("MXFMFMXFMF"), cut("MXFF")
    ([(0, 2), (2, 4)], [(1, 4), (4, 7)], [(0, 2)], [(0, 3), (3, 5), (5, 8), (8, 10)], [(0, 4)])
    """
    plain = range(len(kinds))
    own = [i for i in plain if kinds[i] != "X"]  # not every layer has a cross attention
    readings: list[tuple[Run | None, Sequence[int]]] = [(_longest_run(kinds), plain)]
    for spelt, at in ((mixers_alike(kinds), plain), ([kinds[i] for i in own], own)):
        run = _longest_run(spelt)
        if run is not None and any("F" in kind for kind in spelt[run.start : run.start + run.period]):
            readings.append((run, at))
    found = [bounds(run, at, len(kinds)) for run, at in readings if run is not None]
    attends = any(ATTENTION & set(kind) for kind in kinds)
    found = [one for one in found if not attends or any(ATTENTION & set(kind) for kind in kinds[one[0] : one[-1]])]
    best = max(found, key=lambda one: (one[-1] - one[0], len(one)), default=[0])
    if (best[-1] - best[0]) * 2 < len(kinds) or len(best) < 2:
        return _but_for_one(kinds) or _by_mixer(kinds)
    return list(pairwise(best))


def _but_for_one(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Return the blocks of a stream that is periodic except for one sublayer in its middle that is no attention, such
    as a prediction fed back between two layers; it ends the block before it. Return an empty list where there is no
    such sublayer.

    >>> _but_for_one("FMCFFFMCF"), _but_for_one("MFLF")
    ([(0, 5), (5, 9)], [])
    """
    for period in range(2, LONGEST + 1):
        odd = next((i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]), None)
        for skipped in () if odd is None else range(max(odd, period), odd + period + 1):
            rest = [*kinds[:skipped], *kinds[skipped + 1 :]]
            whole = len(rest) % period == 0 and rest == rest[:period] * (len(rest) // period)
            if whole and len(rest) > period and "M" in rest and kinds[skipped] not in ATTENTION:
                at = [i for i in range(len(kinds)) if i != skipped]
                return list(pairwise(bounds(Run(len(rest), period, 0), at, len(kinds))))
    return []


def bounds(run: Run, at: Sequence[int], count: int) -> list[int]:
    """Return where the blocks of a run start, and where the last one ends. `at`: the index of each recognised sublayer,
    among `count`."""
    ends = [*at, count]
    return [ends[i] for i in range(run.start, run.start + run.covered + 1, run.period)]


def mixers_alike(kinds: Sequence[str]) -> list[str]:
    """Replace the letters of all sublayers that mix positions by one letter, since layers may alternate in how they
    mix. A cross attention at the very start begins a stream, and keeps its letter.

    >>> mixers_alike(["M", "F", "L", "F"]), mixers_alike(["X", "F", "M", "F", "X", "F"])
    (['M', 'F', 'M', 'F'], ['X', 'F', 'M', 'F', 'M', 'F'])
    """
    table = str.maketrans(dict.fromkeys(MIXERS + "X", "M"))
    return ["".join(sorted(kind.translate(table))) if i or kind != "X" else kind for i, kind in enumerate(kinds)]


@dataclass(frozen=True)
class Run:
    covered: int
    period: int
    start: int


def _longest_run(kinds: Sequence[str]) -> Run | None:
    """Return the longest periodic run; of equal ones the least period, and one that starts with attention."""
    best: tuple[int, bool, int, int] | None = None
    for period in range(1, len(kinds) // 2 + 1):
        if best is not None and best[0] > len(kinds) - period:
            break
        stop = len(kinds)  # of the run that starts at `start`: the same for all starts up to the next break
        for start in range(len(kinds) - period - 1, -1, -1):
            if kinds[start] != kinds[start + period]:
                stop = start + period
            covered = (stop - start) // period * period
            rank = (covered, "M" in kinds[start], -period, -start)
            if covered >= 2 * period and (best is None or rank > best):
                best = rank
    return None if best is None else Run(best[0], -best[2], -best[3])


def _by_mixer(kinds: Sequence[str]) -> list[tuple[int, int]]:
    if len(kinds) > 2 and kinds[0] == kinds[-1] == "F" and all(set(kind) <= set(MIXERS) for kind in kinds[1:-1]):
        return [(0, len(kinds))]  # mixers between two halves of a feed-forward are one layer
    starts = [i for i, kind in enumerate(kinds) if set(kind) & set(MIXERS) or (kind == "X" and i == 0)]
    starts = starts or ([0] if kinds else [])
    return list(zip(starts, [*starts[1:], len(kinds)], strict=True))
