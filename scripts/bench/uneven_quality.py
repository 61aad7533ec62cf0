#!/usr/bin/env python3
"""Show what choosing KV heads for each layer brings at equal cache size, and whether the choice is a good one.

    python scripts/bench/uneven_quality.py MODEL --budgets groups=4,groups=2 --out FILE.json
    python scripts/bench/uneven_quality.py demo --out scripts/bench/results/uneven_demo.json

For every budget and seed of the calibration: the plan that `--kv-budget` finds on one half of the held-out windows is
measured on the other half, beside the same number of heads in every layer where there is such a number, and beside
random plans of the same size. Divergence (KL) and rise of the loss are in nats per token, with paired 95 % bootstrap
intervals; `rank` says what share of the random plans is better than the chosen one, `correlation` (Spearman's) how
well sums of single layers' costs predict the divergence of those plans. Figures are written as they come, and what
was solved and measured is kept in --work, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gqa_convert.conversion.head_plan import budget_bytes, legal_counts
from gqa_convert.conversion.plan import ConvertPlan, plan_source, present_heads
from gqa_convert.conversion.recipe import Recipe, make_recipe
from gqa_convert.conversion.solve import solve_blocks
from gqa_convert.evaluate import models
from gqa_convert.evaluate.allocation import BATCH, Allocation, Assembly, allocate, layer_bytes
from gqa_convert.evaluate.evaluation import EvalSettings, make_task
from gqa_convert.evaluate.intervals import mean_per_token
from gqa_convert.evaluate.layer_estimates import estimated_costs
from gqa_convert.evaluate.scoring import WindowSums, score


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="demo", help="held-out text: half to choose on, half to measure on")
    parser.add_argument("--calibrate", default="demo")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--budgets", default="groups=4,groups=2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, help="tokens of a calibration sequence; those of --context if not given")
    parser.add_argument("--refit-steps", type=int)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--no-proxies", action="store_true", help="leave out the estimates of single layers")
    parser.add_argument("--kv-costs", default="measured", help="as of gqa-convert")
    parser.add_argument("--work", type=Path, default=Path("uneven-work"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "settings": {
            name: Path(value).name if name in ("model", "data", "calibrate") else str(value)
            for name, value in vars(args).items()
            if name not in ("out", "work")
        },
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}",
        "runs": [],
    }
    for seed in range(args.seeds):
        for run in measure(args, seed):
            result["runs"].append(run)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({k: v for k, v in run.items() if k not in ("random", "proxies")}), flush=True)


def recipe_of(args: argparse.Namespace, seed: int) -> Recipe:
    """How the command line wants heads merged."""
    return make_recipe(
        args.preset,
        calibrate=args.calibrate,
        sequences=args.sequences,
        length=args.length or args.context,
        refit_steps=args.refit_steps,
        seed=seed,
    )


def measure(args: argparse.Namespace, seed: int) -> Any:
    """Yield one run for each budget."""
    subject = models.subject(args.model)
    settings = EvalSettings(data=args.data, context=args.context, stride=args.context, max_windows=args.windows)
    examples = make_task(subject, subject.source.tokenizer(), settings).examples
    choosing, held_out = examples[::2], examples[1::2]
    recipe = recipe_of(args, seed)
    present = present_heads(subject.source)
    options = [legal_counts(heads) for heads in present]

    def planned(groups: int) -> ConvertPlan:
        return plan_source(subject.source, groups=groups, target=args.work / "out", recipe=recipe)

    plans = {groups: planned(groups) for groups in options[0] if groups < present[0]}
    before = next(iter(plans.values())).kv_cache_bytes_per_token_before
    weights = layer_bytes(plans, present)
    for text in args.budgets.split(","):
        budget = budget_bytes(text, before, lambda groups: plans[groups].kv_cache_bytes_per_token_after)
        started = time.monotonic()
        allocation = allocate(
            plans, present, options, budget, choosing, work=args.work, data=args.data, costs_by=args.kv_costs
        )
        seconds = time.monotonic() - started
        solved = {g: None if p.blocks is None else solve_blocks(p, args.work) for g, p in plans.items()}
        assembly = Assembly(plans, solved, held_out)
        uneven = _sums(assembly, allocation.groups.counts, present)
        run: dict[str, Any] = {
            "seed": seed,
            "budget": text,
            "share": budget / before,
            "seconds_to_choose": round(seconds, 1),
            "groups_per_layer": list(allocation.groups.counts),
            "predicted_kl": allocation.predicted,
            "first_kl": allocation.first.kl,
            "measured_kl": allocation.measured.kl,
            "exchanges": allocation.exchanges,
            "held_out": _figures(uneven),
        }
        same = [g for g in plans if sum(w[g] for w in weights) == budget]
        if same:
            even = _sums(assembly, [same[0]] * len(present), present)
            run["even"] = {"groups": same[0]} | _figures(even)
            run["uneven_minus_even"] = {name: difference(uneven[1], even[1], name) for name in ("kl", "loss")}
        spread = _spread(allocation.groups.counts, options)
        if spread is not None:
            run["spread"] = {"groups_per_layer": spread} | _figures(_sums(assembly, spread, present))
        if text == args.budgets.split(",")[0] and not args.no_proxies:
            run["proxies"] = _proxies(Assembly(plans, solved, choosing), allocation, present)
        run["random"] = _random(assembly, allocation, present, weights, budget, args.random, seed)
        kls = [each["kl"] for each in run["random"]]
        run["rank"] = sum(kl < run["held_out"]["kl"] for kl in kls) / max(1, len(kls))
        run["correlation"] = _spearman([each["predicted"] for each in run["random"]], kls)
        yield run


def _proxies(assembly: Assembly, allocation: Allocation, present: Sequence[int]) -> dict[str, Any]:
    """How well cheap estimates rank what was measured of single layers, and what both took."""
    wanted = [(i, count) for i, layer in enumerate(allocation.costs) for count in layer if count != present[i]]
    measured = [allocation.costs[layer][count].kl for layer, count in wanted]
    started = time.monotonic()
    assembly.measure(dict(wanted[:1]))
    once = time.monotonic() - started
    started = time.monotonic()
    estimates = list(estimated_costs(assembly, wanted, batch=BATCH).values())
    estimated = {"fisher": [each.kl for each in estimates], "local": [each.error for each in estimates]}
    return {
        "wanted": wanted,
        "measured_kl": measured,
        "measured_sum_of_costs_took_about_s": round(once * len(wanted), 1),
        **estimated,
        "seconds": round(time.monotonic() - started, 1),
        "correlation": {name: _spearman(values, measured) for name, values in estimated.items()},
    }


def _spread(counts: Sequence[int], options: Sequence[Sequence[int]]) -> list[int] | None:
    """As many layers of each number of heads, the larger ones at even distances; None where there are not just two."""
    if any(sorted(each) != sorted(options[0]) for each in options) or len(options[0]) != 2:
        return None
    less, more = sorted(options[0])
    many, layers = list(counts).count(more), len(counts)
    kept = {int((number + 0.5) * layers / many) for number in range(many)}
    return [more if layer in kept else less for layer in range(layers)]


def _sums(assembly: Assembly, counts: Sequence[int], present: Sequence[int]) -> tuple[WindowSums, WindowSums]:
    model = assembly.put({i: count for i, count in enumerate(counts) if count != present[i]})
    before, after, _ = score(assembly.original, model, assembly.examples, batch_size=BATCH)
    assert after is not None
    return before, after


def _figures(sums: tuple[WindowSums, WindowSums]) -> dict[str, Any]:
    before, after = sums
    rises = [a - b for a, b in zip(after.sums["loss"], before.sums["loss"], strict=True)]
    return {
        "kl": after.mean("kl"),
        "loss": mean_per_token(rises, after.tokens).to_json(),
        "tokens": sum(after.tokens),
    }


def difference(one: WindowSums, other: WindowSums, name: str) -> dict[str, float]:
    """Mean per token of what sets two models apart on the same windows, with its interval."""
    pairs = zip(one.sums[name], other.sums[name], strict=True)
    apart: dict[str, float] = mean_per_token([a - b for a, b in pairs], one.tokens).to_json()
    return apart


def _random(
    assembly: Assembly,
    allocation: Allocation,
    present: Sequence[int],
    weights: Sequence[Any],
    budget: int,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Random plans within the budget that leave no room to give any layer its next number of heads."""
    draw = random.Random(seed)
    seen: dict[tuple[int, ...], dict[str, Any]] = {}
    for _ in range(50 * count):
        if len(seen) >= count:
            break
        counts = [min(layer) for layer in weights]
        layers = list(range(len(counts)))
        while layers:
            layer = draw.choice(layers)
            more = min((c for c in weights[layer] if c > counts[layer]), default=None)
            trial = [*counts[:layer], more or 0, *counts[layer + 1 :]]
            if more is None or sum(w[c] for w, c in zip(weights, trial, strict=True)) > budget:
                layers.remove(layer)
            else:
                counts = trial
        chosen = tuple(counts)
        if chosen not in seen:
            cost = assembly.measure({i: c for i, c in enumerate(chosen) if c != present[i]})
            predicted = sum(layer[c].kl for layer, c in zip(allocation.costs, chosen, strict=True))
            seen[chosen] = {"groups_per_layer": list(chosen), "predicted": predicted, "kl": cost.kl, "loss": cost.loss}
    return list(seen.values())


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3:
        return None
    first, second = (_ranks(values) for values in (a, b))
    mean = (len(a) - 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(first, second, strict=True))
    return top / sum((x - mean) ** 2 for x in range(len(a)))


def _ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0] * len(values)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


if __name__ == "__main__":
    main()
