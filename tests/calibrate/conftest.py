from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.anatomy.anatomy import Anatomy, dissect
from gqa_convert.anatomy.block_names import BlockNames, Freedom
from gqa_convert.anatomy.blocks import find_blocks
from gqa_convert.anatomy.freedom import prove_freedom
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config
from gqa_convert.tiny.sizes import TEXT_IDS


@dataclass
class Saved:
    """A tiny model in memory and in a folder."""

    model: Any
    checkpoint: Checkpoint
    config: Any

    @property
    def source(self) -> Source:
        return Source(checkpoint=self.checkpoint, config=self.config)

    @property
    def cls(self) -> type:
        return type(self.model)


@dataclass
class Case:
    """A tiny model and what converting it needs."""

    saved: Saved
    anatomy: Anatomy
    blocks: tuple[BlockNames, ...]
    freedom: Freedom

    def converted(self, state: dict[str, torch.Tensor]) -> Any:
        """The target model with the source's weights, and `state` in the place of those it names."""
        model = type(self.anatomy.target_model)(self.anatomy.target_config).float().eval()
        held = dict(self.saved.model.state_dict())
        model.load_state_dict({name: state.get(name, held.get(name)) for name in model.state_dict()})
        return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    known: dict[tuple[Any, ...], Saved] = {}

    def make(model_type: str, **sizes: Any) -> Saved:
        key = (model_type, *sorted(sizes.items()))
        if key not in known:
            model = tiny_model(tiny_config(model_type, **sizes))
            folder = tmp_path_factory.mktemp(model_type)
            with api.quiet():
                model.save_pretrained(folder)
            config = api.load_config(folder, trust_remote_code=False)
            known[key] = Saved(model, Checkpoint.open(folder), config)
        return known[key]

    return make


@pytest.fixture(scope="session")
def case(saved: Callable[..., Saved]) -> Callable[..., Case]:
    known: dict[tuple[Any, ...], Case] = {}

    def make(model_type: str, groups: int = 2, **sizes: Any) -> Case:
        key = (model_type, groups, *sorted(sizes.items()))
        if key not in known:
            source = saved(model_type, **sizes)
            anatomy = dissect(source.source, groups)
            assert anatomy.difference is not None
            known[key] = Case(source, anatomy, find_blocks(anatomy.difference), prove_freedom(source.config))
        return known[key]

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, TEXT_IDS, (48, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"
