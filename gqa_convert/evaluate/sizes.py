"""Read sizes and lists of numbers as people type them. Imports no torch."""

from __future__ import annotations

import re

from gqa_convert.errors import UsageError

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_bytes(text: str, flag: str) -> int:
    """Read `16GiB`, `512M` or `1000000`; k, M, G and T are powers of 1024.

    Raises:
        UsageError: if it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise UsageError(f"{flag} {text}: not a size. Write for example 16GiB, 512M or 80G.")
    return int(float(match[1]) * (1 << _UNITS[match[2]]))


def parse_counts(text: str, flag: str) -> tuple[int, ...]:
    """Read `1,2,4` or `512,8k` (k is 1024).

    Raises:
        UsageError: if an entry is no positive whole number.
    """
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(k?)", part.strip().lower())
        if match is None or int(match[1]) < 1:
            raise UsageError(f"{flag} {text}: {part.strip() or 'an empty entry'!r} is no positive whole number.")
        counts.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(dict.fromkeys(counts))


def parse_count(text: str, flag: str) -> int:
    """Read one number: `512` or `8k`.

    Raises:
        UsageError: if it is no positive whole number, or several.
    """
    counts = parse_counts(text, flag)
    if len(counts) > 1:
        raise UsageError(f"{flag} {text}: takes one number.")
    return counts[0]
