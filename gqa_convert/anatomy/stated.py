"""Which key of a config.json states how many heads there are, for messages.

A family that is written as another one, or that gets modelling code, has no KV field of its own, and a config.json may
leave one out: users are told of the key that they can find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gqa_convert.anatomy import family_facts
from gqa_convert.anatomy.kv_fields import KVField, Path, get_path

# An encoder-decoder names the heads of both; it is the decoder's that are converted.
_HEAD_NAMES = (
    "decoder_attention_heads",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
)


def stated_heads(values: Mapping[str, Any], field: KVField) -> str:
    """Return `config.json: key=number` for the key that states a field's KV heads, or that there is none.

    `values` is the source's own config.json as parsed.
    """
    for path in _candidates(values, field):
        if get_path(values, path) == field.kv_heads:
            return f"config.json: {'.'.join(path)}={field.kv_heads}"
    return f"{values.get('model_type', 'its class')}'s default, as config.json names none"


def _candidates(values: Mapping[str, Any], field: KVField) -> Iterator[Path]:
    yield field.path
    places = (field.path[:-1], (), ("text_config",))
    for place in places:
        yield (*place, field.path[-1])
        for name in (*family_facts.JSON_ALIASES, *_HEAD_NAMES):
            yield (*place, name)
