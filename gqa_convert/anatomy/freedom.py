"""Prove on a tiny random model of an architecture which changes to q, k, v and o leave its function as it is.

A merge that rotates heads relies on these invariances (`gqa_convert.merge.block`). They are never assumed from a name:
random changes of each kind are made to every attention layer at once, and the logits must not move. What does not hold
is refused by name where it is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gqa_convert.anatomy.block_names import BlockNames, Freedom, HeadExtra
from gqa_convert.anatomy.blocks import block_state, find_blocks, layout_for, read_block, rotary_layouts
from gqa_convert.anatomy.extras import candidates, moved_extras
from gqa_convert.anatomy.kv_fields import KVField
from gqa_convert.anatomy.shapes import ShapeDifference
from gqa_convert.anatomy.target import fields_of, retarget
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.heads import Grouping, divisors
from gqa_convert.hf import api
from gqa_convert.tiny.forward import difference as logit_difference
from gqa_convert.tiny.forward import logits
from gqa_convert.tiny.key_shift import shifted_keys, shifted_outputs
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import shrink

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from gqa_convert.anatomy.blocks import Get
    from gqa_convert.merge.block import AttentionBlock, RotaryLayout

    StateOf = Callable[[int, BlockNames, AttentionBlock, Get], dict[str, Tensor]]

TOLERANCE = 1e-4
"""Largest accepted change of a logit, as a share of the largest logit, of float32 models."""

_MOST_CHOICES = 256
"""Sets of per-head parameters that are tried."""

_KINDS: tuple[Literal["none", "half", "interleaved"], ...] = ("none", "half", "interleaved")


@dataclass
class _Subject:
    """A tiny model, its blocks, and its logits before anything is changed."""

    model: Any
    blocks: tuple[BlockNames, ...]
    inputs: dict[str, Tensor]
    before: Tensor
    extras: list[list[HeadExtra]]
    """What may be a per-head parameter, and how."""

    def unchanged(self, freedom: Freedom, change: Callable[[AttentionBlock], AttentionBlock]) -> bool:
        """True if changing every block leaves the logits within float error. The model is restored."""
        return self._same_logits(freedom, lambda _, names, block, get: block_state(names, change(block)))

    def permutes(self, freedom: Freedom, extras: Sequence[HeadExtra], *, cross_alone: bool = False) -> bool:
        """True if heads may change place with those parameters, in every block (or cross-attention) in new orders."""

        def state(number: int, names: BlockNames, block: AttentionBlock, get: Get) -> dict[str, Tensor]:
            if cross_alone and not names.cross:
                return {}
            grouping = _other_order(block.num_kv_heads, number)
            extra = moved_extras(get, names, extras, block.query_order(grouping), grouping.order)
            return block_state(names, block.permuted(grouping)) | extra

        return self._same_logits(freedom, state)

    def _same_logits(self, freedom: Freedom, state_of: StateOf) -> bool:
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            layouts = rotary_layouts(self.model, freedom)
            for number, names in enumerate(self.blocks):
                rotary = layout_for(names, self.model, layouts)
                block = read_block(kept.get, names, freedom, rotary)
                self.model.load_state_dict(state_of(number, names, block, kept.get), strict=False)
            return logit_difference(logits(self.model, self.inputs), self.before) <= TOLERANCE
        except (UnsupportedModelError, ValueError):
            return False
        finally:
            self.model.load_state_dict(kept)


def prove_freedom(config: Any, model_class: Any = None) -> Freedom:
    """Return what may be changed in the attention of `config`'s architecture.

    Args:
        config: the configuration of the model to be converted.
        model_class: its class; by default transformers' own of that configuration.

    Raises:
        UnsupportedModelError: if no attention blocks are recognised in a tiny model of it.
    """
    subject = _subject(config, model_class)
    freedom = Freedom(rotary_kind="none", key_gauge="none", value_gauge="none", permutable=False)
    if subject.unchanged(freedom, _value_change):
        freedom = replace(freedom, value_gauge="full")
    freedom = _key_freedom(subject, freedom)
    extras = _extras(subject, freedom)
    freedom = replace(freedom, permutable=extras is not None, extras=extras or ())
    if extras is None and any(names.cross for names in subject.blocks):
        extras = _extras(subject, freedom, cross_alone=True)
        freedom = replace(freedom, cross_permutable=extras is not None, extras=extras or ())
    return replace(freedom, shift_invariant=_shift_invariant(subject))


def _subject(config: Any, model_class: Any = None) -> _Subject:
    model, fields = _tiny(config, model_class)
    if not fields or fields[0].kv_heads < 2:
        model, fields = _tiny(config, model_class, num_heads=8, num_kv_heads=8)
    difference = _difference(model, fields)
    inputs = text_inputs(model)
    blocks = find_blocks(difference)
    return _Subject(
        model=model,
        blocks=blocks,
        inputs=inputs,
        before=logits(model, inputs),
        extras=candidates(difference, blocks),
    )


def _tiny(config: Any, model_class: Any, **heads: int) -> tuple[Any, tuple[KVField, ...]]:
    """A tiny model of an architecture and its KV fields."""
    tiny = shrink(config, **heads)
    tiny.architectures = getattr(config, "architectures", None)
    model = tiny_model(tiny, cls=model_class)
    return model, fields_of(tiny, tiny.to_dict(), lambda: model)


def _difference(model: Any, fields: Sequence[KVField]) -> ShapeDifference:
    """The tiny model's dependence on KV heads, for the largest smaller count that it can be built with."""
    cls, tiny = type(model), model.config
    values = tiny.to_dict()
    for groups in reversed(divisors(fields[0].kv_heads)[:-1]):
        try:
            changeable = tuple(f for f in fields if f.kv_heads % groups == 0)
            _, target, target_cls = retarget(tiny, values, cls, changeable, groups)
            target_model = api.build_on_meta(target_cls, target)
            return ShapeDifference(model, target_model, tuple(fields), groups)
        except UnsupportedModelError:
            if groups == 1:
                raise
    raise UnsupportedModelError(f"{tiny.model_type}: its KV heads cannot be made fewer.")


def _key_freedom(subject: _Subject, freedom: Freedom) -> Freedom:
    gauges: tuple[tuple[Literal["full", "signs"], Callable[[AttentionBlock], AttentionBlock]], ...] = (
        ("full", _key_change),
        ("signs", _sign_change),
    )
    for gauge, change in gauges:
        for kind in _KINDS:
            candidate = replace(freedom, rotary_kind=kind, key_gauge=gauge)
            if subject.unchanged(candidate, change):
                return candidate
    # A value-only merge still needs the layout's name for its reports; nothing is done to keys.
    return freedom


def _generator() -> Generator:
    import torch

    return torch.Generator().manual_seed(0)


def _repeat(block: AttentionBlock, per_kv: Tensor) -> Tensor:
    return per_kv.repeat_interleave(block.queries_per_kv, dim=0)


def _value_change(block: AttentionBlock) -> AttentionBlock:
    """A random well-conditioned matrix on each v, its inverse on o_proj's columns."""
    import torch

    width = block.w_v.shape[1]
    noise = torch.randn(block.num_kv_heads, width, width, generator=_generator())
    change = torch.linalg.qr(noise).Q * torch.linspace(0.7, 1.4, width)
    inverse = torch.linalg.inv(change)
    w_o = torch.einsum("ohv,hvu->ohu", block.w_o, _repeat(block, inverse))
    b_v = None if block.b_v is None else torch.einsum("kuv,kv->ku", change, block.b_v)
    return replace(block, w_v=change @ block.w_v, w_o=w_o, b_v=b_v)


def _key_change(block: AttentionBlock) -> AttentionBlock:
    """On each k any change that commutes with the rotation, undone on its q heads."""
    import torch

    change = _commuting(block.rotary, block.num_kv_heads, block.head_dim)
    undo = _repeat(block, torch.linalg.inv(change).transpose(1, 2))
    b_k = None if block.b_k is None else torch.einsum("kij,kj->ki", change, block.b_k)
    b_q = None if block.b_q is None else torch.einsum("hij,hj->hi", undo, block.b_q)
    return replace(block, w_k=change @ block.w_k, w_q=undo @ block.w_q, b_k=b_k, b_q=b_q)


def _commuting(rotary: RotaryLayout, heads: int, width: int) -> Tensor:
    """(heads, D, D): a random scaled rotation in each rotary pair, any matrix on the dims that do not turn."""
    import torch

    generator = _generator()
    change = torch.zeros(heads, width, width)
    for a, b in rotary.pairs:
        angle = 6.28 * torch.rand(heads, generator=generator)
        scale = 0.7 + 0.7 * torch.rand(heads, generator=generator)
        change[:, a, a] = change[:, b, b] = scale * torch.cos(angle)
        change[:, a, b] = -scale * torch.sin(angle)
        change[:, b, a] = scale * torch.sin(angle)
    rest = [d for d in range(width) if all(d not in pair for pair in rotary.pairs)]
    if rest:
        noise = torch.randn(heads, len(rest), len(rest), generator=generator)
        part = torch.linalg.qr(noise).Q * torch.linspace(0.7, 1.4, len(rest))
        index = torch.tensor(rest)
        change[:, index[:, None], index[None, :]] = part
    return change


def _sign_change(block: AttentionBlock) -> AttentionBlock:
    """Random signs, one for each rotary pair (or dim that does not turn), on k and on its q heads."""
    import torch

    generator = _generator()
    signs = (torch.rand(block.num_kv_heads, block.head_dim, generator=generator) < 0.5).float() * 2 - 1
    for a, b in block.rotary.pairs:
        signs[:, b] = signs[:, a]
    on_q = _repeat(block, signs)
    return replace(
        block,
        w_k=block.w_k * signs[..., None],
        w_q=block.w_q * on_q[..., None],
        b_k=None if block.b_k is None else block.b_k * signs,
        b_q=None if block.b_q is None else block.b_q * on_q,
    )


def _shift_invariant(subject: _Subject) -> bool:
    """True if a vector added to all of a head's keys changes nothing, as the softmax of a row of scores is the same.

    Not so where a score stands beside those of keys (an attention sink), or is bent before the softmax (a soft cap).
    The vector is added where attention is computed, after any rotation; in code that keeps that to itself, to what the
    key projection gives. What cannot be tried counts as not invariant.
    """
    with shifted_keys(subject.model) as calls:
        seen = logits(subject.model, subject.inputs)
    if not calls():
        with shifted_outputs((subject.model.get_submodule(names.k), _key_rows(names)) for names in subject.blocks):
            seen = logits(subject.model, subject.inputs)
    return logit_difference(seen, subject.before) <= TOLERANCE


def _key_rows(names: BlockNames) -> Callable[[Tensor], Tensor]:
    """Return a mask (X,) of what a key projection gives: 1 where it is keys."""

    def mask(out: Tensor) -> Tensor:
        if names.fused is None:
            return out.new_ones(out.shape[-1])
        rows = replace(names.fused.with_heads(names.kv_heads), dim=0)
        q, k, v = rows.split(out.new_zeros(out.shape[-1]))
        return rows.join(q, k + 1, v)

    return mask


def _extras(subject: _Subject, freedom: Freedom, *, cross_alone: bool = False) -> tuple[HeadExtra, ...] | None:
    """The fewest parameters that must move with their heads so that nothing changes; None if no choice does it."""
    for extras in itertools.islice(_choices(subject.extras), _MOST_CHOICES):
        if subject.permutes(freedom, extras, cross_alone=cross_alone):
            return extras
    return None


def _choices(ways: Sequence[Sequence[HeadExtra]]) -> Iterator[tuple[HeadExtra, ...]]:
    """Every set of candidates with at most one way each, small sets first."""
    for size in range(len(ways) + 1):
        for some in itertools.combinations(ways, size):
            yield from itertools.product(*some)


def _other_order(heads: int, seed: int) -> Grouping:
    """Heads in a random order, never the old one."""
    import torch

    drawn = (torch.randperm(heads - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    order = [*drawn, 0]  # the first head goes last
    return Grouping(tuple((head,) for head in order))
