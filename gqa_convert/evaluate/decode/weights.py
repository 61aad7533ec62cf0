"""Which weights decoding reads, and how far the positions of a model reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gqa_convert.evaluate.decode.caches import filled_cache
from gqa_convert.evaluate.models import decoder_inputs, encoder_output, has_encoder


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters, tied ones counted once."""
    return sum(p.nbytes for p in model.parameters())


@torch.inference_mode()
def bytes_read_per_step(model: Any) -> int:
    """Bytes of weights that decoding one token must read, tied ones counted once.

    They are those of the modules that a step runs: of an encoder-decoder model neither the encoder's nor the
    projections of its output, which the cache holds. Of an embedding one row is read, so it counts only where the
    output layer reads all of it.
    """
    run: list[nn.Module] = []
    modules = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_pre_hook(lambda module, _: run.append(module)) for m in modules]
    source = 2 if has_encoder(model) else None
    cache = filled_cache(model, kind="dynamic", batch=1, context=2, room=0, source=source)
    run.clear()
    ids = torch.full((1, 1), 3, dtype=torch.long, device=next(model.parameters()).device)
    model(**decoder_inputs(ids, encoder_output(model, 1, source) if source else None), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    read = {id(p): p.nbytes for module in run for p in module.parameters(recurse=False)}
    output = model.get_output_embeddings()
    if output is not None:
        read[id(output.weight)] = output.weight.nbytes
    return sum(read.values())


def position_limit(module: Any) -> int | None:
    """The number of positions that an encoder or decoder has learnt; None where any may follow."""
    for name, part in module.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(part, nn.Embedding) and ("position" in leaf or leaf == "wpe") and "relative" not in leaf:
            return part.num_embeddings - int(getattr(part, "offset", 0))
    return None
