"""Whether a hub dataset is there: asked before anything long begins, answered in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gqa_convert.data.documents import SourceSpec
from gqa_convert.errors import HubError

_PATIENCE = 10.0
"""Seconds that the hub has to answer."""
FIRST_WAITS = (1.0, 4.0)
"""Seconds between the tries to open a dataset at the start of a run; one that was read already is waited for longer."""


def missing_dataset(spec: SourceSpec, ask: Callable[..., Any] | None = None) -> str | None:
    """Make sure that the hub has a source's datasets.

    Args:
        spec: of kind `hub`.
        ask: in place of `huggingface_hub`'s `dataset_info`.

    Returns:
        What kept it from being found out (no connection), in words; None if all are there.

    Raises:
        HubError: if the hub answers that there is none of that name or revision, or not for this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    ask = ask or HfApi().dataset_info
    for name in spec.paths:
        try:
            ask(name, revision=spec.revision, timeout=_PATIENCE)
        except GatedRepoError as error:
            raise HubError(
                f"{name}: the dataset is gated. Ask for access on its page, and log in with `hf auth login`."
            ) from error
        except RevisionNotFoundError as error:
            raise HubError(f"{name}: the dataset has no revision {spec.revision!r}.") from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"{name}: the hub has no dataset of that name, or not for you. Check the id, or log in with "
                "`hf auth login`."
            ) from error
        except (HfHubHTTPError, OSError) as error:  # a time-out and being offline are among the latter
            return f"{name}: not looked for, the hub cannot be reached ({type(error).__name__})"
        except Exception as error:  # httpx and requests each have their own
            return f"{name}: not looked for ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    return None
