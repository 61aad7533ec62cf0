"""Which documents are held out: decided by each document's own hash, so that no reordering or growth moves one."""

from __future__ import annotations

import hashlib

_SCALE = 1 << 64


def is_held_out(text: str, fraction: float) -> bool:
    """Say whether a document belongs to the held-out set, which takes about `fraction` of all documents.

    Equal documents fall on the same side, so a duplicate never leaks from one set into the other.
    """
    if fraction <= 0:
        return False
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * _SCALE
