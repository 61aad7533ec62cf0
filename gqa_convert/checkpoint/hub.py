"""From what the user calls a model (a folder or a hub id) to a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from glob import escape
from pathlib import Path, PurePosixPath

from gqa_convert.checkpoint.embedded import CHECKPOINT, DEMO
from gqa_convert.checkpoint.files import MAX_CONFIG_BYTES, read_object
from gqa_convert.checkpoint.reader import CONFIG
from gqa_convert.checkpoint.resolve import BIN_INDEX, BIN_WEIGHTS, SAFE_INDEX, SAFE_WEIGHTS, read_weight_map
from gqa_convert.checkpoint.side_files import is_side_file
from gqa_convert.errors import CheckpointError, HubError, UsageError


def resolve_model(model: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """Return the folder of a model, downloading it from the Hugging Face hub if it is named by id.

    Only what a conversion reads is fetched: config, tokenizer and other small files, and the one set of weights that
    transformers would load. A warm cache serves without a network, and alone under `HF_HUB_OFFLINE=1`.

    Args:
        model: a folder, a hub id such as `"org/name"`, or `demo`: the model that comes with the package.
        revision: branch, tag or commit on the hub.
        cache_dir: hub cache to use in place of the default one.

    Raises:
        UsageError: if `model` is a path that does not exist, or a revision is asked of a folder.
        CheckpointError: if it is a file, or a repository without usable weights.
        HubError: if the hub cannot be reached or refuses.
    """
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):
        if revision is not None:
            raise UsageError(f"--revision {revision}: {model} is a folder here; only models on the hub have revisions.")
        return path
    if model and os.path.exists(path):
        raise CheckpointError(f"{model}: is a file. Give the folder that holds config.json and the weights.")
    if not model or model.startswith(("./", "../", "/", "~")) or model in (".", "..") or model.count("/") > 1:
        raise UsageError(f"{model or repr(model)}: no such folder{_near_path(path) if model else ''}.")
    if model == DEMO and revision is None:
        return CHECKPOINT
    try:
        return _from_hub(model, revision, cache_dir)
    except HubError as error:
        hint = _local_hint(model) if revision is None and _is_absent(error) else ""
        if not hint:
            raise
        raise UsageError(f"{model}: no such folder{hint}. As a hub id: {error}") from error


def _from_hub(model: str, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        with _hub_errors(model, revision):
            return resolve_local(model, revision=revision, cache_dir=cache_dir)
    with _hub_errors(model, revision):
        try:
            return _download(model, revision, cache_dir)
        except Exception as error:
            if not _is_unreachable(error):
                raise
            try:
                return resolve_local(model, revision=revision, cache_dir=cache_dir)
            except OSError:
                raise error from None


def _is_absent(error: HubError) -> bool:
    """Whether a model was not found under its name, for whatever reason, as opposed to refused."""
    from huggingface_hub import errors

    cause = error.__cause__
    refused = (errors.GatedRepoError, errors.RevisionNotFoundError)
    return not isinstance(cause, refused) and (
        not isinstance(cause, errors.HfHubHTTPError) or isinstance(cause, errors.RepositoryNotFoundError)
    )


def _local_hint(model: str) -> str:
    """What speaks for a mistyped path: a folder of nearly that name, or one that is there to hold it. Else empty."""
    first, _, second = model.partition("/")
    if not second:
        near = _nearest(Path(), first)
    elif os.path.isdir(first):
        near = [f"{first}/{name}" for name in _nearest(Path(first), second)]
        if not near:
            return f" in {first}/"
    else:
        near = [f"{name}/{second}" for name in _nearest(Path(), first) if os.path.isdir(os.path.join(name, second))]
    return f" (did you mean {near[0]}?)" if near else ""


def _near_path(path: Path) -> str:
    """What a mistyped path may have meant: a folder of nearly that name beside where it would be. Else empty."""
    near = _nearest(path.parent, path.name)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _nearest(folder: Path, name: str) -> list[str]:
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    return get_close_matches(name, names, n=1, cutoff=0.75)


def resolve_local(model: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """Return the folder of a hub model that is already in the cache; touches no network.

    Raises:
        huggingface_hub.errors.LocalEntryNotFoundError: if it is not, or not completely.
    """
    from huggingface_hub import snapshot_download

    # Only what every use of the model downloads: its cache may be another program's, which took no README.
    needed = [CONFIG, "tokenizer*"]
    return Path(
        snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=needed)
    )


def _download(model: str, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    info = HfApi().model_info(model, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = [sibling.rfilename for sibling in info.siblings or []]

    def fetch(names: list[str]) -> Path:
        patterns = [escape(name) for name in names]
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))

    described = {CONFIG, SAFE_INDEX, BIN_INDEX, "adapter_config.json"}
    small = [name for name in files if name in described or is_side_file(PurePosixPath(name))]
    if not {CONFIG, "adapter_config.json"} & set(small):
        raise CheckpointError(f"{model}: has no config.json on the hub, so it is not a transformers checkpoint.")
    folder = fetch(small)
    if "adapter_config.json" in files:
        return folder
    weights = _weights(folder, files)
    if not weights:
        raise CheckpointError(f"{model}: has neither safetensors nor .bin weights for transformers on the hub.")
    return fetch(small + weights)


def check_upload(repo: str, *, setting: str) -> None:
    """Make sure that a model could be sent to the hub: online, and with a token that the hub knows.

    Args:
        repo: `owner/name`.
        setting: what messages call it.

    Raises:
        UsageError: offline, or without a token.
        HubError: if the hub does not know the token, or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{setting}={repo}: HF_HUB_OFFLINE is set, so nothing can be sent. Unset it, or leave it out.")
    if get_token() is None:
        raise UsageError(f"{setting}={repo}: no token for the hub. Set HF_TOKEN, or log in with `hf auth login`.")
    try:
        HfApi().whoami()
    except Exception as error:  # of the hub, its client, or the network
        raise HubError(f"{setting}={repo}: the hub cannot be asked ({_line(error)}). Is the token right?") from error


def upload_model(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Send a folder to the hub, into a repository that is made if it is missing; returns the commit's address.

    Args:
        folder: the model.
        repo: `owner/name`.
        private: of a repository that is made.
        message: of the commit.

    Raises:
        HubError: if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(f"{repo}: could not be uploaded ({_line(error)}). {folder} is there as it was.") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _weights(folder: Path, files: list[str]) -> list[str]:
    """Choose the weight files of a repository in the order of `resolve_weights`."""
    explicit = read_object(folder / CONFIG, MAX_CONFIG_BYTES).get("transformers_weights")
    if isinstance(explicit, str):
        return [name for name in files if name == explicit]
    for whole, index in ((SAFE_WEIGHTS, SAFE_INDEX), (BIN_WEIGHTS, BIN_INDEX)):
        if whole in files:
            return [whole]
        if index in files:
            named = set(read_weight_map(folder / index).values())
            return [name for name in files if name in named]
    return []


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError)) or _is_transport_error(error)


def _is_transport_error(error: Exception) -> bool:
    # huggingface_hub's HTTP client has changed its name twice (requests, httpx, httpx2); its errors keep theirs.
    return any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line."""
    from huggingface_hub import constants, errors

    at = f"{model}@{revision}" if revision else model
    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError as error:
        raise HubError(f"{model!r}: neither a folder that exists nor a hub id such as org/name.") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{at}: gated. Accept its conditions at {constants.ENDPOINT}/{model}, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{at}: no such folder here, and no such model at {constants.ENDPOINT}. Check the spelling; if it is "
            "private, log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{at}: the hub has the model but not revision {revision!r}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise HubError(
            f"{at}: no such folder here; not (completely) in the local hub cache, and {why}. "
            "Go online, or give a folder."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise HubError(f"{at}: {constants.ENDPOINT} answered with HTTP status {status}. Try again later.") from error
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        reach = _is_unreachable(error)
        raise HubError(
            f"{at}: no such folder here, and {constants.ENDPOINT} cannot be reached ({line}). Check the spelling and "
            "the network."
            if reach
            else f"{at}: download failed ({line})."
        ) from error
