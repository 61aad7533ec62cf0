"""The contract for families that are written as another stock family.

    groups = heads computes the same; averaged heads compute the same as in the source's own layout; tied heads exact;
    left padding; cached decode equals full forward; generate; reload clean, with no remote code

The yardstick is the source's own model: with all heads for `groups = heads`, and with its heads averaged in its own
layout (`gqa_convert.contract.tying`) for fewer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.contract.files import read_tensors, same_bits
from gqa_convert.contract.records import SAME_DECODE, SAME_FUNCTION, Record
from gqa_convert.contract.tying import average_heads
from gqa_convert.errors import UnsupportedModelError
from gqa_convert.modeling.transpile.rule import Rule, rule_for
from gqa_convert.tiny.forward import cache_head_counts, cached_logits, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.shrink import tiny_config

if TYPE_CHECKING:
    from torch import Tensor

HEADS, GROUPS = 8, 2
PADDING = 3  # positions on the left of the first sequence
NEW_TOKENS = 6

# Forms of a family that take different rules.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt_neox": ({"use_parallel_residual": True}, {"use_parallel_residual": False})
}


def prove_transpiling(record: Record, folder: Path, changes: dict[str, Any]) -> None:
    """Run the contract for every form of a family that `changes` leave open, and note what it found.

    Raises:
        Broken: if a check does not hold.
    """
    for number, variant in enumerate(VARIANTS.get(record.model_type, ({},))):
        if any(changes.get(name, value) != value for name, value in variant.items()):
            continue
        config = tiny_config(record.model_type, num_heads=HEADS, num_kv_heads=HEADS, changes={**variant, **changes})
        _Contract(record, folder / str(number), tiny_model(config)).run()
    record.proven = bool(record.checks) and all(record.checks.values())


class _Contract:
    """The steps for one form of a family, each noting its checks in the record."""

    def __init__(self, record: Record, folder: Path, model: Any) -> None:
        self.record = record
        self.folder = folder
        self.model = model
        rule = rule_for(model.config)
        assert rule is not None
        self.rule: Rule = rule
        self.groups = rule.only_groups[0] if rule.only_groups else GROUPS
        self.inputs = text_inputs(model)

    def run(self) -> None:
        """Run every step."""
        averaged = copy.deepcopy(self.model)
        average_heads(averaged, self.groups)
        self.model.save_pretrained(self.folder / "source")
        averaged.save_pretrained(self.folder / "tied")
        self.same("groups_equal_heads_same_logits", self.model, self.convert("source", HEADS), HEADS)
        self.same("tied_heads_same_logits", averaged, self.convert("tied", self.groups), self.groups)
        self.same("untied_heads_averaged", averaged, self.convert("source", self.groups), self.groups)
        self.tied_heads_exact()
        self.refused_groups()

    def convert(self, name: str, groups: int) -> Any:
        """Convert a saved model and load it as a user would, in the family that the rule names."""
        from transformers import AutoModelForCausalLM

        from gqa_convert.conversion.execute import convert

        out = self.folder / f"{name}-{groups}"
        convert(self.folder / name, groups=groups, out=out, route="native")
        self.record.check("no_remote_code", not list(out.rglob("*.py")), "Python files in the output")
        both: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        loaded, info = both
        troubles = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        self.record.check("reload_clean", not troubles, str(troubles)[:200])
        class_name = type(loaded).__name__
        self.record.check(
            "becomes_target", class_name == self.rule.target_class, f"{class_name}, not {self.rule.target_class}"
        )
        return loaded.eval()

    def same(self, name: str, expected: Any, converted: Any, groups: int) -> None:
        """Check that two models compute the same: at once, padded on the left, step by step, and in `generate`."""
        full = logits(expected, self.inputs)
        self.record.check("finite", bool(full.isfinite().all()), "logits are not finite")
        self.record.close(name, full, logits(converted, self.inputs), SAME_FUNCTION)
        padded, real = self.padded()
        self.record.close(
            "left_padding", logits(expected, padded)[real], logits(converted, padded)[real], SAME_FUNCTION
        )
        stepped, cache = cached_logits(converted, self.inputs)
        self.record.close("cached_decode_equals_full_forward", full, stepped, SAME_DECODE)
        held = cache_head_counts(cache)
        self.record.check("cache_holds_groups", set(held) == {groups}, f"cache layers hold {held} heads, not {groups}")
        written = [self.generate(model, padded) for model in (expected, converted)]
        self.record.check("generate_same_tokens", written[0] == written[1], f"{written[0]} and {written[1]}")

    def padded(self) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs with the first sequence padded on the left, positions given, and which positions are real."""
        import torch

        ids = self.inputs["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :PADDING] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, mask.bool()

    def generate(self, model: Any, padded: dict[str, Tensor]) -> list[list[int]]:
        """The greedy continuation of the padded inputs, with the cache."""
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        written: Tensor = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        new_ids: list[list[int]] = written[:, padded["input_ids"].shape[1] :].tolist()
        return new_ids

    def tied_heads_exact(self) -> None:
        """Tied heads merge to themselves, bit for bit: written for all heads, they give what all heads gave."""
        from gqa_convert.conversion.execute import convert

        every = convert(self.folder / "tied", groups=HEADS, out=self.folder / "tied-all", route="native")
        few = convert(self.folder / "tied", groups=self.groups, out=self.folder / "tied-few", route="native")
        assert few.plan.anatomy.difference is not None
        before, after = read_tensors(every.out), read_tensors(few.out)
        expanded = few.plan.anatomy.difference.expand(_tied_too(after, few.plan.anatomy.difference.source_shapes))
        unlike = [name for name, tensor in before.items() if not same_bits(tensor, expanded[name])]
        self.record.check("tied_heads_exact", not unlike, ", ".join(unlike[:3]))

    def refused_groups(self) -> None:
        """A count that the target cannot hold is refused, and nothing is written."""
        from gqa_convert.conversion.execute import convert

        if self.rule.only_groups is None:
            return
        out = self.folder / "refused"
        try:
            convert(self.folder / "source", groups=GROUPS, out=out, route="native")
        except UnsupportedModelError:
            self.record.check("refused_writes_nothing", not out.exists(), "a folder was left behind")
        else:
            self.record.check("refused_with_reason", False, f"converted to {GROUPS} groups")


def _tied_too(state: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    """Add the names of tied weights, which a file leaves out, with any tensor: they are not compared."""
    some = next(iter(state.values()))
    return {name: state.get(name, some) for name in names}
