"""Tiny converted models of families that transformers gives no KV-head setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gqa_convert import convert
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that converts a tiny model of a type once: `make("t5", 2)` is a folder with 2 KV heads."""
    root = tmp_path_factory.mktemp("shipped")
    changes = {"t5v1.1": {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}}

    def source(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            config = tiny_config(name.removesuffix("v1.1"), changes=changes.get(name))
            model = tiny_model(config)
            model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
            if name == "t5v1.1":
                untie(model)
            model.save_pretrained(folder)
        return folder

    def make_folder(name: str, groups: int | None = None, cross_groups: int | None = None) -> Path:
        if groups is None:
            return source(name)
        folder = root / f"{name}-{groups}-{cross_groups}"
        if not folder.exists():
            convert(source(name), groups=groups, cross_groups=cross_groups, allow_slow=True, out=folder)
        return folder

    return make_folder


def untie(model: Any) -> None:
    """Give a T5 an output layer of its own, as T5.1.1 has, which does not scale its outputs."""
    import torch
    from torch import nn

    assert isinstance(model, nn.Module)
    head = model.get_submodule("lm_head")
    head.weight = nn.Parameter(torch.randn_like(cast(Any, model.get_submodule("shared")).weight) / 8)
    model.config.scale_decoder_outputs = False
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # type: ignore[assignment]
