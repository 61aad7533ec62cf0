#!/usr/bin/env python3
"""Print how exactly families are written as other stock families: largest logit differences, as shares of the scale.

    python scripts/bench/transpile_exactness.py
    python scripts/bench/transpile_exactness.py --out scripts/bench/results/transpile_exactness.json

Random models of real layouts (Pythia-70M, GPT-J, ... with fewer layers and a smaller vocabulary), norms and biases far
from their initial values. For every legal number of groups, in float32: a source whose heads are averaged within groups
in its own layout, against its conversion: at once, with the first sequence padded on the left, step by step through the
cache, and in `generate`. In bfloat16, with all heads: the source's bfloat16 logits and the conversion's, each against
the source's weights computed in float32 (root mean square, as a share of the logits' standard deviation).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LENGTH, PADDING, NEW_TOKENS, VOCABULARY = 64, 9, 24, 2048
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
PYTHIA = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "rotary_pct": 0.25,
}

# Name -> (model type, what of its configuration is not the default).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Pythia-70M (parallel)": ("gpt_neox", {**PYTHIA, "use_parallel_residual": True}),
    "GPT-NeoX (sequential)": ("gpt_neox", {**PYTHIA, "use_parallel_residual": False}),
    "GPT-NeoX (sequential, whole heads)": (
        "gpt_neox",
        {**PYTHIA, "use_parallel_residual": False, "rotary_pct": 1.0},
    ),
    "GPT-J": ("gptj", {"n_embd": 512, "n_layer": 6, "n_head": 8, "rotary_dim": 16}),
    "CodeGen": ("codegen", {"n_embd": 512, "n_layer": 6, "n_head": 8, "rotary_dim": 32}),
    "GPT-2": ("gpt2", {"n_embd": 512, "n_layer": 6, "n_head": 8}),
    "OPT": (
        "opt",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "ffn_dim": 2048, "pad_token_id": 1},
    ),
}


def main() -> None:
    """Run the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, help="write the figures as JSON")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    table = {}
    for name, (model_type, fields) in MODELS.items():
        table[name] = measure(name, model_type, fields)
    if args.out:
        names = ("torch", "transformers", "gqa-convert")
        results = {
            "versions": {each: version(each) for each in names},
            "machine": platform.machine(),
            "length": LENGTH,
            "left_padding": PADDING,
            "new_tokens": NEW_TOKENS,
            "models": table,
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(name: str, model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    """All figures of one model; prints its rows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from gqa_convert.modeling.transpile.rule import rule_for
    from gqa_convert.tiny.model import tiny_model

    settings: dict[str, Any] = SMALL | fields
    config = CONFIG_MAPPING[model_type](**settings)
    rule = rule_for(config)
    assert rule is not None
    heads = int(config.num_attention_heads)
    model = tiny_model(config)
    rows: dict[str, Any] = {"becomes": rule.target_class, "float32": {}}
    print(f"{name} -> {rule.target_class}")
    for groups in [g for g in (1, 2, 4, 8) if rule.only_groups is None or g in (*rule.only_groups, heads)]:
        rows["float32"][str(groups)] = row = exactness(model, groups)
        shown = "  ".join(f"{key} {value:.1e}" for key, value in row.items() if isinstance(value, float))
        print(f"  groups {groups}: {shown}  generate {'same' if row['generate_same'] else 'DIFFERS'}")
    rows["bfloat16"] = row = rounding(model, heads)
    print("  bfloat16: " + "  ".join(f"{key} {value:.2%}" for key, value in row.items()), flush=True)
    return rows


def exactness(model: Any, groups: int) -> dict[str, Any]:
    """Largest differences between a source with averaged heads and its conversion, in float32."""
    from gqa_convert.contract.tying import average_heads

    averaged = copy.deepcopy(model)
    average_heads(averaged, groups)
    with tempfile.TemporaryDirectory() as folder:
        averaged.save_pretrained(Path(folder) / "source")
        convert(Path(folder) / "source", Path(folder) / "out", groups)
        converted = load(Path(folder) / "out", torch.float32)
    ids, mask, positions = inputs()
    real = mask.bool()

    def at_once(each: Any) -> Any:
        return each(input_ids=ids).logits

    def padded(each: Any) -> Any:
        return each(input_ids=ids, attention_mask=mask, position_ids=positions).logits[real]

    def generated(each: Any) -> Any:
        how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return each.generate(input_ids=ids, attention_mask=mask, **how)

    with torch.no_grad():
        return {
            "at_once": gap(at_once, averaged, converted),
            "left_padding": gap(padded, averaged, converted),
            "cached_decode": gap(step_by_step, averaged, converted),
            "generate_same": torch.equal(generated(averaged), generated(converted)),
        }


def step_by_step(model: Any) -> Any:
    """Logits of a prefill of half the length and single steps through the cache."""
    ids, pieces, cache = inputs()[0], [], None
    for start, stop in [(0, LENGTH // 2), *((i, i + 1) for i in range(LENGTH // 2, LENGTH))]:
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


def rounding(model: Any, heads: int) -> dict[str, float]:
    """How far bfloat16 logits of a source and of its conversion with all heads are from float32 ones."""
    ids = inputs()[0]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        source, out = Path(folder) / "source", Path(folder) / "out"
        # Casting a loaded model would round its tables of angles too: each is loaded anew in its dtype.
        copy.deepcopy(model).bfloat16().save_pretrained(source)
        convert(source, out, heads)
        exact = load(source, torch.float32)(ids).logits
        seen = {
            "source": load(source, torch.bfloat16)(ids).logits.float(),
            "conversion": load(out, torch.bfloat16)(ids).logits.float(),
            "conversion_in_float32": load(out, torch.float32)(ids).logits,
        }
    differences = {f"{name}_to_exact": distance(x, exact) for name, x in seen.items()}
    return differences | {"conversion_to_source": distance(seen["conversion"], seen["source"])}


def distance(a: Any, b: Any) -> float:
    """Root mean square of a difference, as a share of the standard deviation of `b`."""
    return float((a - b).pow(2).mean().sqrt() / b.std())


def gap(run: Callable[[Any], Any], a: Any, b: Any) -> float:
    """Largest difference between two models' results, as a share of the larger scale."""
    x, y = run(a), run(b)
    return float((x - y).abs().max() / max(x.abs().max(), y.abs().max()))


def convert(source: Path, out: Path, groups: int) -> None:
    """Write a saved model as the other family."""
    import gqa_convert

    gqa_convert.convert(source, groups=groups, out=out, route="native")


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Load a folder as a user would."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def inputs() -> tuple[Any, Any, Any]:
    """Token ids of two sequences, the mask that pads the first on the left, and positions."""
    ids = torch.randint(4, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


if __name__ == "__main__":
    main()
