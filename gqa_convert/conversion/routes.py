"""How a checkpoint becomes a grouped-query model: by a setting of its own, as another stock family, or by shipped code.

`auto` takes what needs no remote code wherever it is exact for the asked groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.recipe import ROUTES
from gqa_convert.errors import CheckpointError, UnsupportedModelError, check_choice
from gqa_convert.heads import Groups, HeadPlan
from gqa_convert.hf import api
from gqa_convert.hf.loading import Source
from gqa_convert.modeling import shipping
from gqa_convert.modeling.transpile.rule import Rule, rule_for
from gqa_convert.modeling.transpile.view import transpiled

_NEED_TOKENIZER_JSON = ("gpt_bigcode", "nemotron")  # transformers' AutoTokenizer maps them to no class of their own
SETTING = "setting"
"""The route of a family that has a setting for its KV heads: nothing is to be chosen."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A source and the way it takes.

    Attributes:
        source: what is to be converted: as stored, or a view in another family's terms.
        route: `setting`, `native` or `remote-code`.
        rule: the transpile rule of the native route.
        model_type: of the source as it is stored.
        class_name: of the source as it is stored; "" where `dissect` tells.
        notes: what a user should know of the way, for the plan.
    """

    source: Source
    route: str = SETTING
    rule: Rule | None = None
    model_type: str = ""
    class_name: str = ""
    notes: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of `source`."""
        return self.source.checkpoint

    @property
    def becomes(self) -> str:
        """What is written, and why, where it is of another family; else empty."""
        if self.rule is None:
            return ""
        only = f" with --groups {', '.join(map(str, self.rule.only_groups))}" if self.rule.only_groups else ""
        return f"{self.rule.target_class} ({self.rule.target}){only}, because {self.rule.why}"


def routed(source: Source, *, groups: Groups | None = None, route: str = "auto") -> Routed:
    """Choose the way of a checkpoint to `groups` KV heads; None asks about the model in general.

    Raises:
        UsageError: if there is no such route.
        UnsupportedModelError: if the asked route does not lead there; the message has the reason.
        CheckpointError: if the weights are not those that the configuration describes.
    """
    check_choice("--route", route, ROUTES)
    config, model_type = source.config, source.model_type
    ships = shipping.ships(model_type)
    if route == "remote-code" and not ships and not shipping.is_shipped(model_type):
        raise UnsupportedModelError(
            f"--route remote-code: there is no modelling code for {model_type} here. Leave --route out."
        )
    apart = isinstance(groups, HeadPlan) and ships and route == "auto"  # no stock family has a number for each layer
    rule = None if route == "remote-code" or apart else rule_for(config)
    obstacle = _obstacle(rule, source, groups) if rule is not None else ""
    as_it_is = rule is not None and groups == config.num_attention_heads
    if rule is None or (ships and route == "auto" and (obstacle or as_it_is)):
        if ships and route == "native":
            raise UnsupportedModelError(
                f"--route native: no stock family of transformers computes what {model_type} does with fewer KV heads. "
                "--route remote-code lets modelling code go along."
            )
        return Routed(
            source=source, route="remote-code" if ships else SETTING, model_type=model_type, notes=source.notes
        )
    if obstacle:
        raise UnsupportedModelError(obstacle)
    return _transpiled(source, rule)


def recorded_route(conversion: Mapping[str, Any]) -> str:
    """The route that the record of a conversion names, as one that can be asked for."""
    route = str(conversion.get("route", "auto"))
    return route if route in ROUTES else "auto"


def _obstacle(rule: Rule, source: Source, groups: Groups | None) -> str:
    """Why a rule does not lead to `groups` KV heads; empty if it does."""
    config, class_name, own = source.config, source.model_class.__name__, api.own_code(source.config)
    if own:
        return (
            f"{source.folder}: config.json's auto_map names modelling code of its own ({own}), and {config.model_type} "
            f"is converted by writing it as {rule.target}, which computes what transformers' own {rule.source_class} "
            "does and not what that code does. If both are the same, convert a copy of the folder without auto_map in "
            "its config.json."
        )
    if class_name != rule.source_class:
        return f"{config.model_type}: holds a {class_name}; only {rule.source_class} is written as {rule.target}."
    reason = rule.refusal(config)
    if reason:
        return f"{config.model_type} cannot be written as {rule.target} exactly: {reason}."
    heads = int(config.num_attention_heads)
    if (
        groups is None
        or isinstance(groups, HeadPlan)
        or rule.only_groups is None
        or groups in (*rule.only_groups, heads)
        or heads % groups
    ):
        return ""
    return (
        f"--groups {groups}: {config.model_type} is written as {rule.target}, which has "
        f"{', '.join(map(str, rule.only_groups))} or {heads} KV heads and nothing between. Choose one of these."
    )


def _transpiled(source: Source, rule: Rule) -> Routed:
    checkpoint, config, model_type = source.checkpoint, source.config, source.model_type
    names, unread = _names(checkpoint, api.KeyMap(source.meta_model))
    _check_complete(checkpoint, source.meta_model, names)
    return Routed(
        source=source.viewed(rule.name, lambda: transpiled(checkpoint, rule, config, names)),
        route="native",
        rule=rule,
        model_type=model_type,
        class_name=source.model_class.__name__,
        notes=rule.notes(config)
        + _rounding(checkpoint, rule)
        + _unread(unread, model_type)
        + _tokenizer(checkpoint, rule),
    )


def _names(checkpoint: Checkpoint, key_map: api.KeyMap) -> tuple[dict[str, str], list[str]]:
    """Parameter name -> raw key of what the source's model reads, and the raw keys that it does not."""
    names: dict[str, str] = {}
    unread = []
    for key, info in checkpoint.tensors.items():
        targets = key_map.targets(key)
        if not targets:
            unread.append(key)
            continue
        name = targets[0]
        expected = tuple(key_map.names[name].shape)
        if len(targets) > 1 or info.shape != expected:
            raise CheckpointError(
                f"{checkpoint.folder}: {key} has shape {info.shape}, but config.json calls for {expected}."
            )
        names[name] = key
    return names, unread


def _check_complete(checkpoint: Checkpoint, model: Any, names: Mapping[str, str]) -> None:
    """Hold the weights to what the source's model calls for: a missing bias must not pass for one of zeros."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [name for name in model.state_dict() if name not in names and tied.get(name) not in names]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.folder}: the weights lack {missing[0]}{more}, which config.json "
            f"({model.config.model_type}) calls for."
        )


def _rounding(checkpoint: Checkpoint, rule: Rule) -> tuple[str, ...]:
    half = sorted({info.dtype for info in checkpoint.tensors.values()} & {"BF16", "F16"})
    if not rule.rounding or not half:
        return ()
    return (f"rounded once to {half[0]} while rewriting: {rule.rounding}",)


def _tokenizer(checkpoint: Checkpoint, rule: Rule) -> tuple[str, ...]:
    """What to do for a tokenizer that AutoTokenizer finds by the source's model type, but not by the target's."""
    names = {path.name for path in checkpoint.side_files}
    if "tokenizer.json" in names or "vocab.json" not in names or rule.target not in _NEED_TOKENIZER_JSON:
        return ()
    return (
        f"AutoTokenizer reads no vocab.json beside a {rule.target} model: save the tokenizer of the source into the "
        "output (AutoTokenizer.from_pretrained(SOURCE).save_pretrained(OUTPUT) writes a tokenizer.json)",
    )


def _unread(keys: list[str], model_type: str) -> tuple[str, ...]:
    if not keys:
        return ()
    return (f"{len(keys)} stored tensors that {model_type}'s code does not read are left out ({keys[0]}, ...)",)
