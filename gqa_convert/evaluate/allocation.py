"""Which layers may give up KV heads: what each costs at each number, measured, and the best plan within a budget.

The model is converted once to every number of heads. Then each layer alone is given its converted weights, every
merged head written back once for each head it replaces (the same function in the original's shapes), and the
divergence from the original is measured on held-out windows. Costs are added up and the cheapest plan within the budget
is found exactly (`gqa_convert.budget.knapsack`). As costs need not add up, the plan is measured whole, and exchanges of
heads between two layers are tried on the whole model as long as they help.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_convert.anatomy.shapes import layer_number
from gqa_convert.budget.knapsack import cheapest
from gqa_convert.calibrate.solve import SolvedLayers
from gqa_convert.calibrate.store import identity
from gqa_convert.conversion.operations import Pool, Solve
from gqa_convert.conversion.plan import ConvertPlan
from gqa_convert.conversion.solve import solve_blocks
from gqa_convert.conversion.tensors import pooled_tensor
from gqa_convert.errors import UsageError, check_choice
from gqa_convert.evaluate.examples import Example
from gqa_convert.evaluate.files import read_json, write_json
from gqa_convert.evaluate.layer_estimates import estimated_costs
from gqa_convert.evaluate.scoring import score
from gqa_convert.heads import HeadPlan
from gqa_convert.hf.loading import load_model
from gqa_convert.modeling import shipping

OnLayer = Callable[[str, int, int], None]
BATCH = 4
"""Windows run at a time."""
MEASURED, ESTIMATED = "measured", "estimated"
"""How single layers' costs are found."""
EXCHANGES = 16
"""Exchanges between two layers that are tried on the whole model."""
_REMEMBERED = 1 << 28
"""Logits of the original that are kept, in numbers (1 GiB)."""


@dataclass(frozen=True)
class Cost:
    """What one layer, or a plan, costs per token: divergence from the original and rise of the loss, in nats."""

    kl: float
    loss: float | None
    """None where it was only estimated."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A plan within a budget, and how it was found.

    Attributes:
        groups: KV heads of each layer.
        budget: KV-cache bytes per token that it may take.
        nbytes: those that it takes.
        costs: what each layer costs at each number of KV heads, alone.
        predicted: sum of the chosen layers' divergences.
        first: the plan of least predicted divergence, measured whole.
        measured: the plan that was chosen, measured whole.
        exchanges: exchanges of heads between two layers that made it better than predicted ones.
        costs_by: whether single layers were measured or estimated.
        tokens: on which all this was measured.
    """

    groups: HeadPlan
    budget: int
    nbytes: int
    costs: tuple[Mapping[int, Cost], ...]
    predicted: float
    first: Cost
    measured: Cost
    exchanges: int
    costs_by: str
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """JSON values; `--groups-per-layer` reads them back."""
        return {
            "groups_per_layer": list(self.groups.counts),
            "budget": self.budget,
            "kv_cache_bytes_per_token": self.nbytes,
            "predicted_kl": self.predicted,
            "first": vars(self.first),
            "measured": vars(self.measured),
            "exchanges": self.exchanges,
            "costs_by": self.costs_by,
            "tokens": self.tokens,
            "costs": [{str(count): vars(cost) for count, cost in layer.items()} for layer in self.costs],
        }


class Remembered:
    """A model whose logits are kept, as far as there is room, so that the same windows are not run again."""

    def __init__(self, model: Any) -> None:
        self._model, self._kept, self._room = model, dict[bytes, Any](), _REMEMBERED

    def parameters(self) -> Iterable[Tensor]:
        """The model's own."""
        parameters: Iterable[Tensor] = self._model.parameters()
        return parameters

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        tensors = sorted((name, x) for name, x in inputs.items() if isinstance(x, Tensor))
        key = b"".join(name.encode() + x.cpu().numpy().tobytes() for name, x in tensors)
        if key in self._kept:
            return self._kept[key]
        output = self._model(**inputs)
        if output.logits.numel() <= self._room:
            self._room -= output.logits.numel()
            self._kept[key] = output
        return output


@dataclass
class Assembly:
    """The original with some layers converted: its weights by number of KV heads and layer, put in when asked for.

    Attributes:
        plans: the conversion to each number of KV heads, where a layer can have it.
        solved: what solving gave for those that solve whole blocks.
    """

    plans: Mapping[int, ConvertPlan]
    solved: Mapping[int, SolvedLayers | None]
    examples: Sequence[Example]
    original: Remembered = field(init=False)
    _model: Any = field(init=False)
    _state: dict[str, Tensor] = field(init=False)
    _at: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        source = next(iter(self.plans.values())).anatomy.source
        model = load_model(source, dtype=torch.float32)
        self.original = Remembered(model)
        self._model = deepcopy(model)
        self._state = model.state_dict()

    def put(self, counts: Mapping[int, int]) -> Any:
        """Return the model whose layers in `counts` have so many KV heads, the others all that they had.

        It is the same object each time.
        """
        for layer in self._at.keys() - counts.keys():
            self._put(layer, None)
        for layer, count in counts.items():
            self._put(layer, count)
        return self._model

    def measure(self, counts: Mapping[int, int]) -> Cost:
        """Measure the model that `put` gives."""
        before, after, _ = score(self.original, self.put(counts), self.examples, batch_size=BATCH)
        assert after is not None
        return Cost(after.mean("kl"), after.mean("loss") - before.mean("loss"))

    def blocks(self) -> dict[int, tuple[str, ...]]:
        """Paths of the attention blocks of every decoder layer that is converted.

        Raises:
            UsageError: if converting a layer changes more than its attention blocks.
        """
        paths: dict[int, dict[str, None]] = {}
        merges = [merge for plan in self.plans.values() for merge in plan.anatomy.merges if merge.is_projection]
        for merge in merges:
            paths.setdefault(layer_number(merge.name), {})[merge.name.rpartition(".")[0].rpartition(".")[0]] = None
        for count, plan in self.plans.items():
            for layer in {layer_number(merge.name) for merge in plan.anatomy.merges}:
                outside = [
                    name
                    for name in self._tensors(count, layer)
                    if not name.startswith(tuple(f"{p}." for p in paths[layer]))
                ]
                if outside:
                    raise UsageError(f"--kv-costs estimated: {outside[0]} lies outside the attention block. Measure.")
        return {layer: tuple(each) for layer, each in sorted(paths.items())}

    def _put(self, layer: int, count: int | None) -> None:
        if self._at.get(layer) == count:
            return
        old = self._at.pop(layer, None)
        if old is not None:
            self._load({name: self._state[name] for name in self._tensors(old, layer)})
        if count is not None:
            self._load(self._tensors(count, layer))
            self._at[layer] = count

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(tensors, strict=False)

    def _tensors(self, count: int, layer: int) -> dict[str, Tensor]:
        """A layer's converted weights in the original's shapes, by parameter name."""
        plan, solved = self.plans[count], self.solved[count]
        difference = plan.anatomy.difference
        assert difference is not None
        names = {merge.key: merge.name for merge in plan.anatomy.merges}
        tensors: dict[str, Tensor] = {}
        for operation in plan.operations:
            name = operation.parameter if isinstance(operation, Solve) else names.get(operation.key, "")
            if not name or layer_number(name) != layer:
                continue
            if isinstance(operation, Solve):
                assert solved is not None
                tensor = solved.tensor(name)
            else:
                assert isinstance(operation, Pool)
                tensor = pooled_tensor(plan.checkpoint, operation).float()
            rows = difference.rows.get(name)
            tensors[name] = tensor if rows is None else rows.expand(tensor)
        return tensors


def layer_bytes(plans: Mapping[int, ConvertPlan], present: Sequence[int]) -> list[dict[int, int]]:
    """KV-cache bytes per token of each layer at each number of KV heads that it can have; `present` is one of them."""
    weights: list[dict[int, int]] = [{} for _ in present]
    for count, plan in plans.items():
        names = {merge.key: merge.name for merge in plan.anatomy.merges}
        for operation in plan.operations:
            if isinstance(operation, Pool | Solve) and operation.cache_bytes_before:
                if plan.cross_groups is not None and shipping.is_cross(names[operation.key]):
                    continue  # set apart: the same whatever is chosen
                layer = layer_number(names[operation.key])
                weights[layer][count] = weights[layer].get(count, 0) + operation.cache_bytes_after
    for layer, heads in enumerate(present):
        one = next((nbytes / count for count, nbytes in weights[layer].items()), 0.0)
        weights[layer][heads] = round(one * heads)
    return weights


def allocate(
    plans: Mapping[int, ConvertPlan],
    present: Sequence[int],
    options: Sequence[Sequence[int]],
    budget: int,
    examples: Sequence[Example],
    *,
    work: Path,
    data: str = "",
    costs_by: str = MEASURED,
    exchanges: int = EXCHANGES,
    on_layer: OnLayer | None = None,
) -> Allocation:
    """Find the plan of least divergence within a budget.

    What is measured is kept in `work` and not measured again.

    Args:
        plans: the conversion to each number of KV heads that any layer may get.
        present: KV heads of each layer now.
        options: KV heads that each layer may get, `present` among them unless it must give some up.
        budget: KV-cache bytes per token of all layers.
        examples: held-out windows.
        work: folder for solved layers and measured costs.
        data: what the windows are of, for the record of costs.
        costs_by: `measured`, each layer's by a forward pass of the whole model; or `estimated`, all by one backward
            pass (`layer_estimates`). Whole plans are measured in any case.
        exchanges: exchanges between two layers to try on the whole model.
        on_layer: told of the progress.

    Raises:
        UsageError: if the budget is below what the fewest heads take.
        GQAConvertError: of the kind that fits.
    """
    check_choice("--kv-costs", costs_by, (MEASURED, ESTIMATED))
    weights = layer_bytes(plans, present)
    weights = [{count: layer[count] for count in some} for layer, some in zip(weights, options, strict=True)]
    cheapest([dict.fromkeys(layer, 0.0) for layer in weights], weights, budget)  # refuse before hours of work
    solved = {
        count: None if plan.blocks is None else solve_blocks(plan, work, on_layer=on_layer)
        for count, plan in plans.items()
    }
    assembly = Assembly(plans, solved, examples)
    ledger = _Ledger(work, plans, examples, data)
    wanted = [(layer, count) for layer, some in enumerate(options) for count in some if count != present[layer]]
    costs: list[dict[int, Cost]] = [{heads: Cost(0.0, 0.0)} for heads in present]
    if costs_by == ESTIMATED:
        told = None if on_layer is None else partial(on_layer, "estimating single layers")
        for (layer, count), estimate in estimated_costs(assembly, wanted, batch=BATCH, on_batch=told).items():
            costs[layer][count] = Cost(estimate.kl, None)
    else:
        for done, (layer, count) in enumerate(wanted):
            if on_layer is not None:
                on_layer("measuring single layers", done, len(wanted))
            costs[layer][count] = ledger.measure(assembly, {layer: count})
    costs = [{count: layer[count] for count in some} for layer, some in zip(costs, options, strict=True)]
    prices = [{count: cost.kl for count, cost in layer.items()} for layer in costs]

    def whole(counts: Sequence[int]) -> Cost:
        return ledger.measure(assembly, {i: count for i, count in enumerate(counts) if count != present[i]})

    counts = cheapest(prices, weights, budget)
    first = measured = whole(counts)
    tried, better = {counts}, 0
    while len(tried) <= exchanges:
        trial = _next(counts, prices, weights, budget, tried)
        if trial is None:
            break
        tried.add(trial)
        if on_layer is not None:
            on_layer("trying exchanges", len(tried) - 1, exchanges)
        seen = whole(trial)
        if seen.kl < measured.kl:
            counts, measured, better = trial, seen, better + 1
    return Allocation(
        groups=HeadPlan(counts),
        budget=budget,
        nbytes=sum(layer[count] for layer, count in zip(weights, counts, strict=True)),
        costs=tuple(costs),
        predicted=sum(layer[count] for layer, count in zip(prices, counts, strict=True)),
        first=first,
        measured=measured,
        exchanges=better,
        costs_by=costs_by,
        tokens=int(sum(example.scored.sum() for example in examples)),
    )


def _next(
    counts: tuple[int, ...],
    prices: Sequence[Mapping[int, float]],
    weights: Sequence[Mapping[int, int]],
    budget: int,
    tried: set[tuple[int, ...]],
) -> tuple[int, ...] | None:
    """The change of at most two layers of least predicted cost within the budget that was not tried; None if none."""
    spare = budget - sum(weight[count] for weight, count in zip(weights, counts, strict=True))
    moves = [
        (prices[i][to] - prices[i][count], weights[i][to] - weights[i][count], i, to)
        for i, count in enumerate(counts)
        for to in prices[i]
        if to != count
    ]
    best: tuple[float, tuple[int, ...]] | None = None
    for a, (price_a, weight_a, i, to_i) in enumerate(moves):
        for price_b, weight_b, j, to_j in moves[a + 1 :]:
            if i == j or weight_a + weight_b > spare or (weight_a <= 0 and weight_b <= 0):
                continue  # heads are only given up for another layer's sake
            if best is not None and price_a + price_b >= best[0]:
                continue
            trial = tuple(to_i if n == i else to_j if n == j else count for n, count in enumerate(counts))
            if trial not in tried:
                best = (price_a + price_b, trial)
    return None if best is None else best[1]


class _Ledger:
    """What was measured, in a file that says of what."""

    def __init__(self, work: Path, plans: Mapping[int, ConvertPlan], examples: Sequence[Example], data: str) -> None:
        plan = next(iter(plans.values()))
        windows = hashlib.sha256()
        for example in examples:
            for name, x in sorted(example.inputs.items()):
                windows.update(name.encode() + x.numpy().tobytes())
        key = {
            "source": identity(plan.checkpoint),
            "class": plan.class_name,
            "recipe": plan.recipe.to_json(),
            "plans": {str(count): str(each.anatomy.groups) for count, each in plans.items()},
            "windows": windows.hexdigest(),
            "data": data,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._path = work / f"costs-{digest}.json"
        kept = read_json(self._path)
        self._seen: dict[str, Any] = kept if isinstance(kept, dict) else {}

    def measure(self, assembly: Assembly, counts: Mapping[int, int]) -> Cost:
        """Measure a choice of KV heads, or take it from the file."""
        name = ",".join(f"{layer}:{count}" for layer, count in sorted(counts.items()))
        kept: Any = self._seen.get(name)
        try:
            return Cost(float(kept["kl"]), float(kept["loss"]))
        except (TypeError, KeyError, ValueError):
            cost = assembly.measure(counts) if counts else Cost(0.0, 0.0)
        self._seen[name] = vars(cost)
        write_json(self._path, self._seen)
        return cost
