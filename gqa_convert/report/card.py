"""The model card of a converted folder: README.md with the hub's metadata. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gqa_convert.console import size
from gqa_convert.evaluate.files import read_json
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.modeling.engines import where_it_runs
from gqa_convert.report.collect import Run

_OURS = "<!-- written by gqa report -->"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def may_write(folder: Path) -> bool:
    """Whether the folder's README.md is missing, one of ours, or carried over from the original."""
    path = folder / "README.md"
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return _OURS in text or "gqa" not in text.lower()


def card(run: Run, point: SweepPoint, *, base_model: str = "") -> str:
    """Write the card of one point's model.

    Args:
        run: what was measured.
        point: whose model it is.
        base_model: hub id of the original; by default the one the conversion recorded, if any.
    """
    folder = run.model_folder(point)
    provenance = read_json(folder / "gqa_convert.json") or {}
    source = provenance.get("source", {})
    base_model = base_model or source.get("hub", {}).get("repo_id", "")
    base_name = base_model or source.get("name") or run.base["base"]["name"]
    detail = run.details[point.name]
    sections = [
        _metadata(folder, base_model),
        _OURS,
        f"# {Path(str(base_name)).name}, {point.groups} KV heads",
        _opening(run, point, str(base_name)),
        "## How to load\n\n" + _loading(folder),
        "## What it costs and saves\n\n" + _numbers(run, point, detail),
        "## Where it runs\n\n" + _where(provenance, folder),
        "## How it was made\n\n" + _making(provenance, detail),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(folder: Path, base_model: str) -> str:
    """YAML front matter. Values are written as JSON strings, which YAML reads as they are."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    license_id = _license(folder)
    if license_id:
        lines.append(f"license: {license_id}")
    if _REPO_ID.fullmatch(base_model):
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: finetune"]
    lines += ["tags:", *(f"- {tag}" for tag in ("gqa", "grouped-query-attention", "gqa-convert", "kv-cache"))]
    return "\n".join([*lines, "---"])


def _license(folder: Path) -> str:
    """The licence of the original, where its own card was carried over and names one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


def _opening(run: Run, point: SweepPoint, base_name: str) -> str:
    base = run.base["base"]
    return (
        f"{base_name} converted to grouped-query attention: {base['kv_heads']} KV heads became "
        f"{point.groups}, shared by {base['query_heads']} query heads. Its KV cache takes "
        f"{point.cache_ratio:.1%} of the original's memory. It is stored as transformers stores models."
    )


def _where(provenance: dict[str, Any], folder: Path) -> str:
    """In which engines a model converted this way was seen to compute what it should, and in which not."""
    config = read_json(folder / "config.json") or {}
    source = provenance.get("conversion", {}).get("model_type", config.get("model_type"))
    lines = where_it_runs(str(source), str(config.get("model_type")))
    if not lines:
        return "No engine but transformers was checked with models of this family."
    tested = "Checked with random models of this family, against transformers:"
    return "\n".join([tested, "", *(f"- {line[0].upper()}{line[1:]}." for line in lines)])


def _loading(folder: Path) -> str:
    config = read_json(folder / "config.json") or {}
    remote = ", trust_remote_code=True" if config.get("auto_map") else ""
    auto = "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"
    return (
        f"```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
        'folder = "..."  # this folder, or the name of this repository\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(folder{remote})\n```"
    )


def _numbers(run: Run, point: SweepPoint, detail: dict[str, Any]) -> str:
    base, evaluation = run.base["base"], detail.get("evaluation") or run.base
    assert point.interval is not None
    model = evaluation["converted"][0]["model"]
    rows = [
        ("KV heads", str(base["kv_heads"]), str(point.groups)),
        ("parameters", f"{base['parameters']:,}", f"{point.parameters:,}"),
        ("KV cache per token", size(base["kv_cache_bytes_per_token"]), size(point.cache_bytes_per_token or 0)),
        ("held-out loss, nats per token", f"{base['loss']:.4f}", f"{model['loss']:.4f}"),
        ("perplexity", f"{base['perplexity']:.2f}", f"{model['perplexity']:.2f}"),
    ]
    lines = ["| | original | this model |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    lines.append(
        f"\nLoss rise {point.loss_difference:+.4f} (95 % interval {point.interval[0]:+.4f} to "
        f"{point.interval[1]:+.4f}), KL(original || this) {point.kl:.4f} nats per token, same most likely token "
        f"{point.top1_agreement:.1%}; on {evaluation['data']}, {evaluation['tokens']:,} tokens, {evaluation['dtype']}."
    )
    bench = detail.get("bench")
    if bench:
        lines.append("")
        lines += [f"- {line}" for line in bench["conclusions"]]
        lines.append(f"\nDecoding measured in {bench['dtype']} on {bench['device']}.")
    return "\n".join(lines)


def _making(provenance: dict[str, Any], detail: dict[str, Any]) -> str:
    tool = " ".join(str(value) for value in provenance.get("tool", {}).values()) or "gqa-convert"
    recipe = ", ".join(
        f"{key} {value}" for key, value in detail.get("recipe", {}).items() if value not in (None, False)
    )
    versions = ", ".join(f"{key} {value}" for key, value in provenance.get("versions", {}).items())
    lines = [f"Converted with {tool}: {recipe}."]
    if versions:
        lines.append(f"Versions: {versions}. `gqa_convert.json` has the whole record.")
    return " ".join(lines)
