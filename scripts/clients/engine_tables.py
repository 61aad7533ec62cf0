#!/usr/bin/env python
"""Write what run.py found into docs/serving.md, and its summary into the package, where plans and cards read it.

python scripts/clients/engine_tables.py
python scripts/clients/engine_tables.py --check     # exit code 1 if either is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGE, SUMMARY = ROOT / "docs" / "serving.md", ROOT / "gqa_convert" / "modeling" / "engines.json"
BEGIN, END = "<!-- from scripts/clients/results.json -->", "<!-- end -->"

TOLERANCE, OWN_GELU = 1e-4, 5e-3
OWN_GELUS = ("llamacpp", "mlx", "genai")
"""Nats within which log-probabilities count as the same. llama.cpp's GELU is a table in half precision; mlx-lm and
GenAI compute one form of it (exact, by tanh, or faster yet) in a family, whatever config.json says."""
VARIANTS = ("Llama, theta 50,000", "Llama, head_dim 64")
"""Models that show one setting; the family's own row decides what plans say."""
NAMES = {"vllm": "vLLM", "llamacpp": "llama.cpp", "openvino": "OpenVINO", "ctranslate2": "CTranslate2", "mlx": "mlx-lm"}
NAMES |= {"genai": "ONNX Runtime GenAI", "onnx": "ONNX Runtime", "lm_eval": "lm-eval"}
WHY = {
    ("llamacpp", "nemotron"): "its Nemotron always squares a ReLU, this model has the GELU of GPT-NeoX",
    ("llamacpp", "gpt_bigcode"): "its StarCoder always has GELU, OPT has ReLU",
    ("genai", "nemotron"): "its Nemotron always squares a ReLU, this model has the GELU of GPT-NeoX",
    ("mlx", "nemotron"): "its Nemotron always squares a ReLU, this model has the GELU of GPT-NeoX",
    ("mlx", "gpt_bigcode"): "its GPTBigCode always has GELU, OPT has ReLU",
}
"""Why an engine is silently wrong, by the written type."""


def verdict(engine: str, answer: dict[str, Any], control: dict[str, Any]) -> str:
    """`right`, `mended`, `refused`, `unlike_source` (as far off as the source is there) or `wrong`."""
    if "mended" in answer:
        return "mended" if answer["mended"]["difference"] <= _tolerance(engine) else "refused"
    if "error" in answer:
        return "refused"
    if answer["difference"] <= _tolerance(engine):
        return "right"
    return "unlike_source" if answer["difference"] <= 3 * control.get("difference", 0.0) else "wrong"


def _tolerance(engine: str) -> float:
    return OWN_GELU if engine in OWN_GELUS else TOLERANCE


def rows(results: dict[str, Any]) -> dict[str, dict[str, tuple[str, dict[str, Any], dict[str, Any]]]]:
    """Model -> engine -> (verdict, the worst answer about a converted folder, the control's answer)."""
    order = ("right", "unlike_source", "mended", "refused", "wrong")
    table: dict[str, dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {}
    for engine, seen in results["engines"].items():
        controls = {r["model"]: r for r in seen["answers"] if r["label"].startswith("MHA")}
        for answer in (r for r in seen["answers"] if not r["label"].startswith("MHA")):
            control = controls[answer["model"]]
            cell = (verdict(engine, answer, control), answer, control)
            before = table.setdefault(answer["model"], {}).get(engine)
            if before is None or _badness(cell, order) > _badness(before, order):
                table[answer["model"]][engine] = cell
    return table


def _badness(cell: tuple[str, dict[str, Any], dict[str, Any]], order: tuple[str, ...]) -> tuple[int, float]:
    return order.index(cell[0]), cell[1].get("difference", 0.0)


def name_of(engine: str, results: dict[str, Any]) -> str:
    """An engine as people call it: `vLLM`, `transformers 4.57`."""
    release = str(results["engines"][engine]["version"])
    if engine in NAMES:
        return NAMES[engine]
    return re.sub(r"^(\S+ \d+\.\d+).*", r"\1", release)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """What plans and cards say, by `source>written` model types."""
    families: dict[str, Any] = {}
    for model, cells in rows(results).items():
        if model in VARIANTS:
            continue
        _, first, control = next(iter(cells.values()))
        seen: dict[str, Any] = {"right": [], "mended": {}, "unlike_source": [], "wrong": {}}
        seen |= {"refused": [], "refused_source_too": []}
        for engine, (kind, answer, source) in cells.items():
            name = name_of(engine, results)
            if kind == "wrong":
                why = WHY.get((engine, answer["type"]), "nobody knows why")
                seen["wrong"][name] = f"{why}: off by up to {answer['difference']:.1g} nats"
            elif kind == "mended":
                seen["mended"][name] = answer["mended"]["by"]
            else:
                seen["refused_source_too" if kind == "refused" and "error" in source else kind].append(name)
        families[f"{control['type']}>{first['type']}"] = seen
    versions = {name_of(engine, results): seen["version"] for engine, seen in results["engines"].items()}
    return {"checked_with": results["reference"], "date": results["date"], "versions": versions, "families": families}


def page_table(results: dict[str, Any]) -> str:
    """The table of the docs, with what each refusal said."""
    engines = list(results["engines"])
    lines = ["Checked: " + "; ".join(str(results["engines"][e]["version"]) for e in engines) + "."]
    reference = ", ".join(f"{name} {release}" for name, release in results["reference"].items())
    lines += [f"Against: {reference} ({results['machine']}, Python {results['python']}, {results['date']}).", ""]
    lines.append("| source, converted | " + " | ".join(name_of(e, results) for e in engines) + " |")
    lines.append("|---|" + "--:|" * len(engines))
    said: dict[tuple[str, str], list[str]] = {}
    for model, cells in rows(results).items():
        shown = []
        for engine in engines:
            kind, answer, control = cells.get(engine, ("", {}, {}))
            shown.append(_cell(kind, answer, control))
            if kind in ("refused", "mended") and "error" not in control:
                said.setdefault((name_of(engine, results), _short(answer["error"])), []).append(model)
        written = next(iter(cells.values()))[1]["type"]
        control_type = next(iter(cells.values()))[2]["type"]
        label = model if written == control_type else f"{model} -> {written}"
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    lines += ["", *_quantised(results), "", "What was said where the source is not refused as well:", ""]
    lines += [f"- {engine}: `{error}` ({', '.join(models)})" for (engine, error), models in said.items()]
    return "\n".join(lines)


def _quantised(results: dict[str, Any]) -> list[str]:
    """How far llama.cpp's Q4_K_M is off, for sources and for conversions."""
    off: dict[bool, list[float]] = {True: [], False: []}
    for answer in results["engines"].get("llamacpp", {"answers": []})["answers"]:
        answer = answer.get("mended", answer)
        if "q4_k_m_difference" in answer:
            off[str(answer.get("label", "")).startswith("MHA")].append(answer["q4_k_m_difference"])
    if not all(off.values()):
        return []
    return [
        f"llama.cpp's Q4_K_M, which rounds random weights hard: median {median(off[False]):.2f} nats over "
        f"{len(off[False])} conversions, {median(off[True]):.2f} over {len(off[True])} sources."
    ]


def _cell(kind: str, answer: dict[str, Any], control: dict[str, Any]) -> str:
    if not kind:
        return ""
    if kind == "mended":
        return f"{answer['mended']['difference']:.0e} &#8224;"
    if kind == "refused":
        return "-, source too" if "error" in control else "-"
    figure = f"{answer['difference']:.1f}" if answer["difference"] >= 0.05 else f"{answer['difference']:.0e}"
    figure = "0" if answer["difference"] == 0 else figure
    if kind == "wrong":
        return f"**{figure} wrong**"
    return f"{figure}, source too" if kind == "unlike_source" else figure


def _short(error: str) -> str:
    text = re.sub(r"/tmp/\S+|TEMPORARY|'?FOLDER\S*|[0-9a-f]{12,}", "...", error).replace("`", "'")
    return text if len(text) <= 140 else text[:137] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file would change")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    texts = {
        PAGE: before + BEGIN + "\n\n" + page_table(results) + "\n\n" + END + rest.split(END)[1],
        SUMMARY: json.dumps(summary(results), indent=1) + "\n",
    }
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if args.check:
        sys.exit(f"not what {RESULTS.name} says: {', '.join(map(str, stale))}" if stale else 0)
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")


if __name__ == "__main__":
    main()
