"""Where links in a checkpoint folder may lead: nowhere outside it.

A Hugging Face hub cache is the one exception: there `models--X--Y/snapshots/REV/file` is a symlink to
`models--X--Y/blobs/HASH`, so a link may lead anywhere inside the same `models--X--Y`.
"""

from __future__ import annotations

import os
from pathlib import Path


def hub_snapshot(folder: Path) -> tuple[Path, str] | None:
    """Return the `models--X--Y` folder and the revision if `folder` is a hub cache's snapshot or inside one."""
    real = Path(os.path.realpath(folder))
    for here in (real, *real.parents):
        repo = here.parent.parent
        if here.parent.name == "snapshots" and repo.name.startswith("models--"):
            return repo, here.name
    return None


def stays_inside(folder: Path, file: Path) -> bool:
    """Tell whether `file`, symlinks resolved, lies in `folder`, or in the same hub cache entry if it is a snapshot."""
    snapshot = hub_snapshot(folder)
    home = snapshot[0] if snapshot else Path(os.path.realpath(folder))
    try:
        return Path(os.path.realpath(file)).is_relative_to(home)
    except ValueError:
        return False  # a name that no file can have: half a surrogate pair, a NUL byte
