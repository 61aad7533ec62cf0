"""The errors a user can meet, each kind with its own exit code.

A message says what was seen (values), where (file, tensor, flag), and what to do next. The command line prints the
message alone; a traceback is for faults of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`did you mean X? ` for the nearest of the choices; empty if none is near."""
    near = get_close_matches(word.lower(), list(choices), n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def check_choice(name: str, word: str, choices: Iterable[str]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        UsageError: naming the nearest and all of them.
    """
    listed = list(choices)
    if word not in listed:
        nearest = did_you_mean(word, listed)
        raise UsageError(f"{name} {word}: {nearest}{'C' if nearest else 'c'}hoose one of {', '.join(listed)}.")
