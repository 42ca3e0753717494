"""How many module paths are written in few words: `layer1.0–2.conv3` for three of them.

Decides how lists of names are shortened for a person. Must not know what they name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def collapse(names: Iterable[str]) -> list[str]:
    """Returns the names with those that differ in one number put together, in the order of their first one.

    `a.0.b, a.1.b, a.2.b, c` becomes `a.0–2.b, c`; numbers with gaps are listed: `a.0,2,5.b`.
    """
    found: dict[tuple[str, ...], list[tuple[tuple[int, ...], ...]]] = {}
    for name in dict.fromkeys(names):
        pieces = re.split(r"(\d+)", name)
        numbers = tuple((int(number),) for number in pieces[1::2])
        found.setdefault(tuple(pieces[::2]), []).append(numbers)
    return [_spell(words, numbers) for words, rows in found.items() for numbers in _merge(rows)]


def beside(name: str, path: str) -> str:
    """Returns `name` with the leading components that it shares with `path` as an ellipsis: `….conv2`."""
    parts, others = name.split("."), path.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return name if shared == 0 else ".".join(["…", *parts[shared:]])


def _merge(rows: Sequence[tuple[tuple[int, ...], ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Puts rows together that are equal in all places but one, place by place."""
    merged = list(rows)
    for place in range(len(rows[0])):
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for row in merged:
            alike.setdefault(row[:place] + row[place + 1 :], []).extend(row[place])
        merged = [(*rest[:place], tuple(sorted(own)), *rest[place:]) for rest, own in alike.items()]
    return merged


def _spell(words: Sequence[str], numbers: Sequence[Sequence[int]]) -> str:
    text = words[0]
    for own, word in zip(numbers, words[1:], strict=True):
        text += _ranges(own) + word
    return text


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
