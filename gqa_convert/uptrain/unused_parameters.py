"""Which parameters the loss reaches. The others (an image tower under a text model) are left out of training.

On one device they would stay as they are anyway. Engines of many processes wait for a gradient of everything that is
to be trained, and stop or hang where one never comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gqa_convert.uptrain.model import ScoredModel, computing, probe_inputs

_NAMED = 4


def freeze_unreached(scored: ScoredModel, tell: Callable[[str], None]) -> list[str]:
    """Freeze the modules no parameter of which takes part in the loss; returns their names.

    An expert that no token of the probe went to stays: another batch will send it some.
    """
    live = reached(scored)
    frozen = [name for name in _dead_modules(scored, live) if not _is_choice(scored, name, live)]
    for name in frozen:
        scored.get_submodule(name).requires_grad_(False)
    if frozen:
        shown = ", ".join(name.removeprefix("model.") for name in frozen[:_NAMED])
        more = f" and {len(frozen) - _NAMED} more" if len(frozen) > _NAMED else ""
        tell(f"not trained, since text does not reach them: {shown}{more}")
    return frozen


def freeze_modules(scored: nn.Module, names: list[str]) -> None:
    """Freeze the modules that a model of the same kind, of fewer layers, has been found not to reach.

    Of a layer's modules those of the same name in every layer are meant, the layers being alike.
    """
    for name in names:
        pattern = re.compile(re.sub(r"(^|\\\.)\d+(?=\\\.|$)", r"\1\\d+", re.escape(name)))
        for path, module in scored.named_modules():
            if pattern.fullmatch(path):
                module.requires_grad_(False)


@torch.enable_grad()
def reached(scored: ScoredModel) -> set[int]:
    """Ids of the parameters that a gradient would come to, found by walking the graph of a few tokens' loss."""
    inputs = probe_inputs(scored.model, 1, 8, restart=None)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    with computing(scored.model):
        loss, _ = scored(inputs, labels)
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    live: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            live.add(id(node.variable))
        nodes.extend(following for following, _ in node.next_functions)
    return live


def _dead_modules(scored: nn.Module, live: set[int]) -> list[str]:
    """The outermost modules with parameters to train of which none is reached."""
    dead: list[str] = []
    for name, module in scored.named_modules():
        if name and not any(name.startswith(f"{outer}.") for outer in dead) and _is_dead(module, live):
            dead.append(name)
    return dead


def _is_dead(module: nn.Module, live: set[int]) -> bool:
    wanted = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
    return bool(wanted) and live.isdisjoint(wanted)


def _is_choice(scored: nn.Module, name: str, live: set[int]) -> bool:
    """Whether a module is one of several in a list of which others are reached."""
    outer, _, last = name.rpartition(".")
    siblings = scored.get_submodule(outer)
    return isinstance(siblings, nn.ModuleList) and any(
        type(other) is type(siblings[int(last)]) and not _is_dead(other, live) for other in siblings
    )
