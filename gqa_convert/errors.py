"""The errors a user can meet, each kind with its own exit code.

A message says what was seen (values), where (file, tensor, flag), and what to do next. The command line prints the
message alone; a traceback is for faults of ours.
"""

from __future__ import annotations


class GQAConvertError(Exception):
    """Root of every error raised on purpose."""

    exit_code = 1


class UsageError(GQAConvertError):
    """A flag or argument that cannot be honoured (exit code 2)."""

    exit_code = 2


class VerificationError(GQAConvertError):
    """The written checkpoint is not what the plan promised (exit code 3)."""

    exit_code = 3


class CheckpointError(GQAConvertError):
    """The source folder is missing, damaged, unsafe or inconsistent (exit code 4)."""

    exit_code = 4


class UnsupportedModelError(GQAConvertError):
    """The model cannot become a grouped-query one here, for the reason given (exit code 5)."""

    exit_code = 5


class OutputError(GQAConvertError):
    """The target exists, cannot be written, or the disk is full (exit code 6)."""

    exit_code = 6


class HubError(GQAConvertError):
    """A model named by hub id could not be fetched (exit code 7)."""

    exit_code = 7


class TrainingAborted(GQAConvertError):
    """Training met numbers it must not go on with; the last checkpoint is untouched (exit code 8)."""

    exit_code = 8


class Preempted(GQAConvertError):
    """Stopped by a signal after saving: run the same command again to go on (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75
