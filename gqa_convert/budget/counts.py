"""Numbers as people type them, the same spelling meaning the same number everywhere. Imports no torch.

`k` is 1,024, as of contexts (`8k` is 8,192); `M`, `B` (or `G`) and `T` count tokens by thousands: a million, a billion,
a trillion. Of bytes all units are powers of 1,024.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from gqa_convert.errors import UsageError

_UNITS = {"": 1, "k": 1 << 10, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]{1,3})?)\s*([kmbgt]?)", re.IGNORECASE | re.ASCII)
_BYTE_POWERS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_BYTES = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_LARGEST = (1 << 63) - 1


def parse_count(text: str | int | float) -> int:
    """Read a count with an optional unit: `2T`, `299.9B`, `8k` (8,192), `1e9`, `2_097_152`.

    Raises:
        UsageError: if it is not one, not a whole number, or larger than any count of tokens.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not math.isfinite(text):
            raise UsageError(f"{text!r}: not a whole number of tokens or steps.")
        value = Decimal(text)
    else:
        match = _COUNT.fullmatch(str(text).strip()) if len(str(text)) <= 64 else None
        if match is None:
            shown = repr(text) if len(repr(text)) <= 64 else repr(text)[:64] + " ..."
            raise UsageError(f"{shown}: not a count. Write 2000000000, 2e9, 2_000_000_000, 2B, 1.5T, or 8k for 8,192.")
        value = Decimal(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2].lower()]
    if value > _LARGEST:
        raise UsageError(f"{str(text)[:64]}: more tokens or steps than there are; at most {_LARGEST:,}.")
    whole = round(value)
    if value < 0 or abs(value - whole) > Decimal("1e-6") * max(1, whole):
        raise UsageError(f"{text!r}: not a whole number of tokens or steps.")
    return whole


def parse_counts(text: str, flag: str) -> tuple[int, ...]:
    """Read a list of counts: `1,2,4` or `512,8k`, each at least 1; what comes twice is kept once.

    Raises:
        UsageError: naming the flag, if an entry is no positive whole number.
    """
    counts = []
    for part in text.split(","):
        try:
            count = parse_count(part)
        except UsageError:
            count = 0
        if count < 1:
            raise UsageError(f"{flag} {text}: {part.strip() or 'an empty entry'!r} is no positive whole number.")
        counts.append(count)
    return tuple(dict.fromkeys(counts))


def parse_single(text: str, flag: str) -> int:
    """Read one count of at least 1: `512` or `8k`.

    Raises:
        UsageError: naming the flag, if it is none, or several.
    """
    counts = parse_counts(text, flag)
    if len(counts) > 1:
        raise UsageError(f"{flag} {text}: takes one number.")
    return counts[0]


def parse_bytes(text: str, flag: str) -> int:
    """Read `16GiB`, `512M` or `1000000`; k, M, G and T are powers of 1024.

    Raises:
        UsageError: naming the flag, if it is no size.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{flag} {text}: not a size. Write for example 16GiB, 512M or 80G.")
    return int(Decimal(match[1]) * (1 << _BYTE_POWERS[match[2].lower()]))


def format_count(value: float) -> str:
    """Spell a count for people: `2.1M`, `52.4B`, `131,072`. No `k`, which would not mean a thousand when read."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"
