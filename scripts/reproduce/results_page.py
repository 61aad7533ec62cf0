"""results.json, the figures and RESULTS.md, from pieces that are done."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import speed
import tables
import words
from chain import Chain
from figures import draw
from findings import Findings
from pieces import IN_ONE_GO, Pieces, versions
from scales import Scale, Scales


def write_report(args: Namespace, scales: Scales) -> None:
    """Measure decode times, if that is not done, and write everything about the families that have a finished seed."""
    finished = Pieces(args.out, finished_only=True)
    families = {
        family: {
            str(seed): results_of_seed
            for seed in scale.seeds
            if (results_of_seed := Chain(finished, scale, family, seed).finished()) is not None
        }
        for family, scale in scales.items()
    }
    families = {family: seeds for family, seeds in families.items() if seeds}
    if not families:
        raise SystemExit("nothing to report yet: no seed has all of the paper's arms")
    pieces = Pieces(args.out)
    any_scale = next(iter(scales.values()))
    timed = {
        "figure_6": pieces.get(
            "figure-6", {"decode": asdict(any_scale.decode)}, lambda _: speed.figure_6(any_scale)
        ).result,
        "table_1": {family: table_1(pieces, family, scales[family]) for family in families},
    }
    whole = args.out / IN_ONE_GO
    results = {
        "format": 1,
        "in_one_go": json.loads(whole.read_text(encoding="utf-8")) if whole.exists() else None,
        "command": shlex.join(["python", "scripts/reproduce/run.py", *shown(sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "scales": {family: asdict(scales[family]) for family in families},
        "decode": timed,
        "families": families,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    render(results, args.out)


def table_1(pieces: Pieces, family: str, scale: Scale) -> dict[str, Any]:
    """The times of Table 1, measured once."""
    shapes = {size: asdict(getattr(scale, size)) for size in ("decode", "large", "small")}
    described = shapes | {"groups": scale.gqa_groups}
    return pieces.get(f"table-1-{family}", described, lambda _: speed.table_1(family, scale)).result


def render(results: dict[str, Any], out: Path) -> None:
    """Write RESULTS.md and the figures of results."""
    families = {name: findings(results, name) for name in results["families"]}
    draw(out / "figures", families, results["decode"]["figure_6"])
    (out / "RESULTS.md").write_text(page(results, families), encoding="utf-8")


def findings(results: dict[str, Any], family: str) -> Findings:
    """One family's numbers."""
    scale = results["scales"][family]
    total = scale["steps"] * scale["batch"] * scale["context"]
    return Findings({int(seed): value for seed, value in results["families"][family].items()}, total)


def page(results: dict[str, Any], families: dict[str, Findings]) -> str:
    """RESULTS.md."""
    scales, timed = results["scales"], results["decode"]
    parts = [
        "# The paper's ablations on models trained here",
        INTRODUCTION,
        "Machine: {processor}, {processors} processors, {system}; ".format(**results["machine"])
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + f".\n\n    {results['command']}",
        _work(results),
        *(tables.family(name, of_family, scales[name], timed["table_1"][name]) for name, of_family in families.items()),
        "## Figure 6: time by the number of groups\n\n![Figure 6](figures/figure-6.png)",
        _figure_6(timed["figure_6"], next(iter(scales.values()))["decode"]),
        words.speed(timed["figure_6"]),
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _work(results: dict[str, Any]) -> str:
    """What all of it takes, and what its seconds are."""
    known, unknown = {}, []
    for family, seeds in results["families"].items():
        spent = [seed.get("processor_seconds") for seed in seeds.values()]
        if None in spent:
            unknown.append(family)
        else:
            known[family] = sum(spent) / 60
    said = []
    if (whole := results.get("in_one_go")) is not None:
        said.append(
            f"All models were trained, converted and uptrained by one command in {whole['minutes']:.1f} minutes, "
            f"{whole['jobs']} processes side by side; decode times were measured after it, with nothing beside them."
        )
    if known:
        parts = ", ".join(f"{family} {minutes:.0f}" for family, minutes in known.items())
        said.append(
            f"Processor minutes of all seeds: {parts}. `--jobs 2` runs two processes side by side, on two "
            f"cores one thread each: at least {sum(known.values()) / 2:.0f} minutes where nothing else runs. Seconds "
            "of converting and training are the processor's."
        )
    if unknown:
        said.append(
            f"What {', '.join(unknown)} took in all was not recorded: some pieces (such as the pretraining) were made "
            "by an older version of these scripts."
        )
    return " ".join(said)


def _figure_6(decoding: dict[str, Any], decode: dict[str, Any]) -> str:
    rows = [
        [str(m["kv_heads"]), f"{m['seconds_per_sample']:.3f}", f"{m['quartiles'][0]:.3f} to {m['quartiles'][1]:.3f}",
         f"{m['cache_bytes'] / 2**20:.0f}"]
        for m in sorted(decoding["models"].values(), key=lambda m: m["kv_heads"])
    ]  # fmt: skip
    shape = decode["shape"]
    measured = (
        f"A decoder of random weights, {shape['layers']} layers of width {shape['width']} with {shape['heads']} heads: "
        f"{decoding['output_tokens']} tokens behind a cache of {decoding['context']:,}, batch {decoding['batch']}, "
        f"{decoding['dtype']}, threads: {decoding['threads']}."
    )
    return f"{measured}\n\n" + tables.table(["groups", "time per sample, s", "quartiles", "cache, MiB"], rows)


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": gpu or platform.machine(),
        "processors": os.cpu_count(),
        "system": platform.system(),
        "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
    }


def shown(arguments: list[str]) -> list[str]:
    """The command line that makes all of it, with a plain name for the output folder."""
    kept = [argument for argument in arguments if argument != "--report"]
    if "--out" in kept:
        kept[kept.index("--out") + 1] = "runs/reproduce"
    return kept


INTRODUCTION = """Written by `scripts/reproduce/run.py`; nothing here is typed by hand. The paper is Ainslie et al. 2023
([2305.13245](https://arxiv.org/abs/2305.13245)).

What is the same: models are pretrained, converted, and uptrained on the same text with the same objective and the
schedule continued, for a share alpha of the pretraining's steps; the control is the original, continued on the same
tokens in the same order. What differs: the models are smaller by four orders of magnitude, the text is Python source,
the optimiser has a fresh state (AdamW for the decoder, Adafactor for the T5, as in the paper), and quality is the
**held-out loss of the pretraining itself**: nothing is fine-tuned on a task before it is measured, which the paper does
at every alpha, 0 too. Losses therefore show much larger gaps than the paper's points do."""

LIMITS = """## Limits

- Intervals are over seeds alone, and Student's t of three is wide.
- The models are small and the text is little. Gaps are taken to the control, which saw the same tokens, and not to
  the model before: at these learning rates the control itself moves.
- Uptraining starts with a fresh optimiser at the pretraining's full learning rate; a start that is already good may
  lose a little in the first steps (its curve rises before it falls), probably by it; that was not tested.
- Calibration tokens are no uptraining, but they are tokens: the conversion's fixed cost weighs more the shorter the
  pretraining is. At the paper's size 5 % are fifty billion tokens, and a calibration of a quarter million vanishes.
- The refit of `best` reads its calibration tokens again and again (a step is 2,048 tokens per layer), so tokens are
  not what it costs: the column in seconds is. On models this small it is about what uptraining by 5 % costs.
- Between 0 tokens and the first evaluation a curve is taken to be a straight line."""
