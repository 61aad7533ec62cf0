"""Labels beside points that do not overprint each other. Imports no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_FONT = 9
_WIDE, _HIGH = 0.62, 1.1
"""Size of a character, as a share of the font's."""
_MARKER = 4.5
"""Half the width of a point's marker, in points."""
_Box = tuple[float, float, float, float]


def place_labels(axes: Any, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write each label beside its point, at the nearest place that covers no other label and no marker.

    Limits and scales of the axes must be set before.

    Args:
        axes: where to write.
        labels: x and y of the point in data, and the text.
    """
    pixels_per_point = axes.figure.dpi / 72
    centres = [tuple(axes.transData.transform((x, y)) / pixels_per_point) for x, y, _ in labels]
    taken: list[_Box] = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in centres]
    for (x, y, text), (left, bottom) in zip(labels, centres, strict=True):
        wide, high = len(text) * _WIDE * _FONT, _HIGH * _FONT
        places = [(dx, dy) for reach in (6, 14, 24, 36) for dx, dy in _around(reach, wide, high)]
        free = [place for place in places if not _covers(left + place[0], bottom + place[1], wide, high, taken)]
        dx, dy = (free or places)[0]
        taken.append((left + dx, bottom + dy, left + dx + wide, bottom + dy + high))
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(dx, dy), fontsize=_FONT)


def _around(reach: float, wide: float, high: float) -> list[tuple[float, float]]:
    """Offsets of a label's lower left corner: right, above, left, below, and between."""
    middle = -high / 2
    return [
        (reach, reach / 2 - 2),
        (reach, middle),
        (reach, -reach / 2 - high),
        (-wide / 2, reach),
        (-wide / 2, -reach - high),
        (-reach - wide, middle),
        (-reach - wide, reach / 2),
        (-reach - wide, -reach / 2 - high),
    ]


def _covers(left: float, bottom: float, wide: float, high: float, taken: Sequence[_Box]) -> bool:
    return any(
        left < right and low_left < left + wide and bottom < top and low < bottom + high
        for low_left, low, right, top in taken
    )
