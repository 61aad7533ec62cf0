"""What goes wrong with disks and memory while training, said in one line with its exit code."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gqa_convert.errors import GQAConvertError, OutputError, TrainingAborted

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK = {*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG}
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


@contextmanager
def clear_faults(output: Path) -> Iterator[None]:
    """Turn errors of the disk under a run's folder, and memory that does not suffice, into errors of ours.

    Raises:
        OutputError: for the disk.
        TrainingAborted: for memory.
    """
    try:
        yield
    except GQAConvertError:
        raise
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        outside = path is not None and not path.absolute().is_relative_to(output.absolute())
        if error.errno not in _DISK or (outside and error.errno not in _FULL):
            raise
        what = "the disk is full" if error.errno in _FULL else str(error.strerror)
        raise OutputError(
            f"{path or output}: cannot be written ({what}). Checkpoints that were finished are untouched. Free some "
            "space or put the permission right, and run again to go on."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        words = " ".join(str(error).split())[:160]
        raise TrainingAborted(
            f"memory does not suffice ({words or 'the system gave none'}). Lower train.micro_batch, data.context, "
            "data.window or objective.loss_chunk, or set train.gradient_checkpointing. Checkpoints are untouched."
        ) from error
