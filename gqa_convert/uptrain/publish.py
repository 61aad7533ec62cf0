"""The result goes to the hub: whether it may is asked before training; it is sent once its model card is written."""

from __future__ import annotations

from pathlib import Path

from gqa_convert.checkpoint.hub import check_upload, upload_model
from gqa_convert.uptrain.config import UptrainConfig


def check_push(config: UptrainConfig) -> None:
    """Make sure before training that the result can be sent.

    Raises:
        UsageError: offline, or without a token.
        HubError: if the hub does not know the token, or cannot be reached.
    """
    if config.push is not None:
        check_upload(config.push, setting="push")


def push_final(config: UptrainConfig, folder: Path) -> str | None:
    """Send the result; returns the address of the commit, None if nothing is to be sent.

    Raises:
        HubError: if the hub refuses; the result stays where it is.
    """
    if config.push is None:
        return None
    return upload_model(folder, config.push, private=config.push_private, message="Uptrained by gqa-convert")
