"""The contract, shown for one family on a tiny random model.

    tied heads exact; groups = heads identical; other tensors identical; cached decode equals full forward; reload clean

A GQA model G is made at random and turned into an MHA model M by writing each KV head several times. M computes what G
does, so converting M back must give G, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy.family_facts import refused_families
from gqa_convert.contract.files import read_tensors, same_bits
from gqa_convert.contract.kv_axes import KVAxes
from gqa_convert.contract.records import SAME_DECODE, SAME_FUNCTION, Broken, Record
from gqa_convert.contract.remote_code import eager_logits, leave_inputs
from gqa_convert.contract.transpiled import prove_transpiling
from gqa_convert.errors import UnsupportedModelError, VerificationError
from gqa_convert.modeling import shipping
from gqa_convert.modeling.transpile.rule import rules_for
from gqa_convert.tiny.forward import cache_head_counts, cached_logits, logits
from gqa_convert.tiny.model import text_inputs, tiny_model
from gqa_convert.tiny.overrides import KV_HEADS, SIDE_FILES, TOWERS
from gqa_convert.tiny.shrink import tiny_config

if TYPE_CHECKING:
    from torch import Tensor


def prove(model_type: str, folder: Path, *, changes: dict[str, Any] | None = None) -> Record:
    """Run the contract for `model_type` with its config defaults and `changes`, writing checkpoints below `folder`.

    A model whose modelling code is shipped is left at `folder/converted` with inputs for a stranger to run
    (`gqa_convert.contract.remote_code.meet_strangers`).
    """
    record = Record(model_type)
    started = time.perf_counter()
    try:
        _prove(record, folder, changes or {})
    except Broken as error:
        record.reason = str(error)
    except Exception as error:  # whatever a family's own code raises is a finding, not a fault of the run
        record.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        record.seconds = round(time.perf_counter() - started, 2)
    return record


def _prove(record: Record, folder: Path, changes: dict[str, Any]) -> None:
    ships = shipping.ships(record.model_type)
    if rules_for(record.model_type):
        prove_transpiling(record, folder / "transpiled", changes)
        if not ships:
            return
    contract = _Contract(record.model_type, folder, changes, record)
    if record.model_type in refused_families():
        contract.refusal()
        record.refused = True
        return
    contract.run()
    if ships:
        contract.eager_same_logits()
        leave_inputs(folder / "converted", contract.inputs, contract.saved)
    record.proven = all(record.checks.values())


class _Contract:
    """The steps for one family; each notes its checks in the record and stops at the first that does not hold."""

    def __init__(self, model_type: str, folder: Path, changes: dict[str, Any], record: Record) -> None:
        self.folder = folder
        self.record = record
        self.heads, self.groups = KV_HEADS.get(model_type, (8, 2))

        # A family that can also be written as another one is shown here the way of its own code.
        self.route: dict[str, Any] = {}
        if shipping.ships(model_type):
            self.route = {"route": "remote-code", "allow_slow": True}

        if model_type in TOWERS:
            record.note = "with another vision tower, as its own needs a package that is not a dependency"

        def build(kv_heads: int, seed: int) -> Any:
            config = tiny_config(model_type, num_kv_heads=kv_heads, changes=changes)
            return tiny_model(config, seed)

        self.build: Callable[[int, int], Any] = build

    def run(self) -> None:
        """Run every step."""
        self.gqa = self.build(self.groups, 0)
        self.mha = self.build(self.heads, 1)
        self.axes = KVAxes(self.mha, self.gqa, self.heads, self.groups)
        self.check("builds_differ", bool(self.axes.changed()), "the number of KV heads changes no parameter")
        self.inputs = text_inputs(self.gqa)
        self.save(self.gqa, "gqa")
        self.save(self.mha, "untied")
        self.untied = {name: tensor.clone() for name, tensor in self.mha.state_dict().items()}
        self.mha.load_state_dict(self.axes.expand(self.gqa.state_dict()))
        self.save(self.mha, "mha")
        self.saved = logits(self.reload("round_trip_clean", self.folder / "mha"), self.inputs)
        self.same_function()
        self.tied_heads_exact()
        self.groups_equal_heads_identical()
        self.untied_heads_averaged()

    def save(self, model: Any, name: str) -> None:
        """Save a model as the hub would have it."""
        import torch

        model.save_pretrained(self.folder / name)
        for file, content in SIDE_FILES.get(self.record.model_type, {}).items():
            torch.save(content, self.folder / name / file)

    def refusal(self) -> None:
        """The converter declines, with the reason on record where it knows the family, and writes nothing.

        Wrappers (class N) are as their default decoder is, which none of them lets have fewer KV heads.
        """
        from gqa_convert.conversion.execute import convert

        kind, self.record.reason = refused_families()[self.record.model_type]
        try:
            self.build(self.heads, 0).save_pretrained(self.folder / "mha")
        except Exception:  # families that this proof cannot build tiny are declined by name all the same
            return
        try:
            convert(self.folder / "mha", groups=self.groups, out=self.folder / "converted")
        except UnsupportedModelError as error:
            known = kind == "N" or self.record.reason in str(error)
            self.check("refused_with_reason", known, str(error)[:200])
        else:
            self.check("refused_with_reason", False, "converted, though it is on record as refused")
        self.check("refused_writes_nothing", not (self.folder / "converted").exists(), "a folder was left behind")

    def check(self, name: str, held: bool, otherwise: str) -> None:
        """Note a check; see `Record.check`."""
        self.record.check(name, held, otherwise)

    def close(self, name: str, a: Tensor, b: Tensor, bound: float) -> None:
        """Check that two results agree; see `Record.close`."""
        self.record.close(name, a, b, bound)

    def same_function(self) -> None:
        """The model with repeated heads is the GQA model, and the GQA model's cache is the smaller."""
        self.full = logits(self.gqa, self.inputs)
        self.check("finite", bool(self.full.isfinite().all()), "logits are not finite")
        self.close("repeated_heads_same_logits", self.full, logits(self.mha, self.inputs), SAME_FUNCTION)
        stepped, cache = cached_logits(self.gqa, self.inputs)
        self.close("cached_decode_equals_full_forward", self.full, stepped, SAME_DECODE)
        large, large_cache = cached_logits(self.mha, self.inputs)
        self.close("cached_decode_equals_full_forward", self.full, large, SAME_DECODE)
        few, many = cache_head_counts(cache), cache_head_counts(large_cache)
        ratio = self.axes.ratio
        self.check(
            "cache_holds_groups",
            bool(few) and min(few) == self.groups and [ratio * count for count in few] == many,
            f"cache layers hold {few} heads with {self.groups} KV heads, {many} with {self.heads}",
        )

    def tied_heads_exact(self) -> None:
        """Converting the model with repeated heads gives the GQA model's files back."""
        from gqa_convert.conversion.execute import convert

        out = self.folder / "converted"
        convert(self.folder / "mha", groups=self.groups, out=out, **self.route)
        expected, written = read_tensors(self.folder / "gqa"), read_tensors(out)
        self.check("same_keys", expected.keys() == written.keys(), _first(expected.keys() ^ written.keys()))
        unlike = [key for key, tensor in expected.items() if not same_bits(tensor, written[key])]
        self.check("tied_heads_exact", not unlike, _first(unlike))
        want, got = (_said(path / "config.json") for path in (self.folder / "gqa", out))
        self.check("config_same", want == got, _first(key for key in want | got if want.get(key) != got.get(key)))
        loaded = self.reload("reload_clean", out)
        self.close("converted_same_logits", self.saved, logits(loaded, self.inputs), SAME_FUNCTION)

    def reload(self, name: str, folder: Path) -> Any:
        """Load a folder as a user would and check that nothing is missing, unexpected or of another shape.

        `round_trip_clean` is about a folder that was only saved: where it fails, transformers loses keys by itself.
        """
        from transformers import PreTrainedModel

        cls = type(self.gqa)
        own, common = (getattr(each.from_pretrained, "__func__", None) for each in (cls, PreTrainedModel))
        assert common is not None
        # Qwen2.5-Omni's own from_pretrained, which also reads voices, cannot return what was missing.
        loaded, info = common(cls, folder, output_loading_info=True)
        if own is not common:
            loaded = cls.from_pretrained(folder)
        troubles = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        self.check(name, not troubles, str(troubles)[:200])
        return loaded.eval()

    def groups_equal_heads_identical(self) -> None:
        """Converting to as many groups as there are heads copies the weights byte for byte."""
        from gqa_convert.conversion.execute import convert

        out = self.folder / "identity"
        convert(self.folder / "mha", groups=self.heads, out=out, **self.route)
        for source in sorted((self.folder / "mha").glob("*.safetensors")):
            same = source.read_bytes() == (out / source.name).read_bytes()
            self.check("groups_equal_heads_identical", same, source.name)

    def untied_heads_averaged(self) -> None:
        """Heads that differ become their mean, other tensors are copied, and `--verify logits` agrees."""
        from gqa_convert.conversion.execute import convert

        out = self.folder / "averaged"
        try:
            result = convert(self.folder / "untied", groups=self.groups, out=out, verify="logits", **self.route)
        except VerificationError as error:
            raise Broken(f"logits_verified: {error}") from error
        self.check("logits_verified", result.checks["logit_scale"] > 0, "all logits are zero")
        merged = {merge.key for merge in result.plan.anatomy.merges}
        before, after = read_tensors(self.folder / "untied"), read_tensors(out)
        unlike = [key for key in after if key not in merged and not same_bits(before[key], after[key])]
        self.check("other_tensors_identical", not unlike, _first(unlike))
        loaded = self.reload("reload_clean", out).state_dict()
        unsaved = set(getattr(self.gqa, "_keys_to_ignore_on_save", None) or ())  # positions that are computed anew
        for name, expected in self.axes.pool(self.untied).items():
            if name in unsaved:
                continue
            self.close("untied_heads_averaged", expected.float(), loaded[name].float(), 1e-6)

    def eager_same_logits(self) -> None:
        """A shipped modelling file serves the eager attention function as it does the usual one."""
        self.close("eager_same_logits", self.full, eager_logits(self.gqa, self.inputs), SAME_FUNCTION)


def _said(path: Path) -> dict[str, Any]:
    """What a config.json says; no KV heads of a cross-attention that there is not is as good as null.

    Shipped code is named for `AutoModel` too when converting; `save_pretrained` names the model's own class alone.
    """
    values: dict[str, Any] = json.loads(path.read_text())
    if len(values.get("auto_map") or ()) > 2:
        values["auto_map"].pop("AutoModel", None)
    return {name: value for name, value in values.items() if value is not None or not name.startswith("cross_")}


def _first(keys: Any) -> str:
    """Name the first of some keys and count the others."""
    listed = sorted(keys)
    return f"{listed[0]} ({len(listed)} in all)" if listed else ""
