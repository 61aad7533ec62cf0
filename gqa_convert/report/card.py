"""The model card of a converted folder: README.md with the hub's metadata. Imports no torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.ownership import CARD_MARK
from gqa_convert.evaluate import metrics
from gqa_convert.evaluate.files import read_json
from gqa_convert.evaluate.results import Evaluation, ModelResult
from gqa_convert.evaluate.sweep.points import SweepPoint
from gqa_convert.modeling.engines import where_it_runs
from gqa_convert.report.collect import Detail, Run

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_TAGS = ("gqa", "grouped-query-attention", "gqa-convert", "kv-cache")
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")
_LONGEST = 1 << 20
"""Bytes of a README.md that are looked at; cards are a hundredth of it."""


def may_write(folder: Path) -> bool:
    """Whether the folder's README.md is missing, bears our mark, or is the original's as converting carried it over.

    The conversion's record, `gqa_convert.json`, lists the files that it wrote with their hashes.
    """
    path = folder / "README.md"
    if not path.exists() and not path.is_symlink():
        return True
    content = _content(path)
    if content is None:
        return False
    if CARD_MARK.encode() in content:
        return True
    listed = _object(_record(folder).get("files")).get("README.md")
    return _object(listed).get("sha256") == hashlib.sha256(content).hexdigest()


def card(run: Run, point: SweepPoint, *, base_model: str = "") -> str:
    """Write the card of one point's model.

    Args:
        run: what was measured.
        point: whose model it is.
        base_model: hub id of the original; by default the one the conversion recorded, if any.
    """
    assert run.base is not None
    folder = run.model_folder(point)
    record = _record(folder)
    source = _object(record.get("source"))
    base_model = base_model or str(_object(source.get("hub")).get("repo_id") or "")
    base_name = " ".join((base_model or run.base.base.name).split())
    title = f"{Path(base_name).name}, {point.groups} KV heads"
    detail = run.details[point.name]
    measured = detail.evaluation or run.base
    sections = [
        f"---\n{_metadata(folder, base_model, title, point, measured).to_yaml()}\n---",
        CARD_MARK,
        f"# {_plain(title)}",
        _opening(run.base.base, point, base_name),
        "## How to load\n\n" + _loading(folder),
        "## What it costs and saves\n\n" + _numbers(run.base.base, point, measured, detail),
        "## Where it runs\n\n" + _where(record, folder),
        "## How it was made\n\n" + _making(record, detail),
    ]
    return "\n\n".join(sections) + "\n"


def _content(path: Path) -> bytes | None:
    """A small regular file's bytes; None for anything else."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LONGEST:
            return None
        return path.read_bytes()
    except OSError:
        return None


def _record(folder: Path) -> dict[str, Any]:
    return _object(read_json(folder / "gqa_convert.json"))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(text: object) -> str:
    """Text that markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _metadata(folder: Path, base_model: str, title: str, point: SweepPoint, measured: Evaluation) -> ModelCardData:
    """The hub's metadata: licence and the like from the original's card, results of every metric on the card."""
    from huggingface_hub import EvalResult, ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    config = _object(read_json(folder / "config.json"))
    task = "text2text-generation" if config.get("is_encoder_decoder") else "text-generation"
    front = _front_matter(folder)
    known: dict[str, Any] = {name: front[name] for name in _INHERITED if _is_text(front.get(name))}
    try:
        validate_repo_id(base_model)
        known |= {"base_model": base_model, "base_model_relation": "finetune"} if "/" in base_model else {}
    except HFValidationError:
        pass
    results = [
        EvalResult(
            task_type=task,
            dataset_type="text",
            dataset_name=measured.data,
            metric_type=metric.name,
            metric_name=metric.label,
            metric_value=point.figures[metric.name].value,
        )
        for metric in metrics.shown("card", [point.figures])
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=list(_TAGS),
        model_name=title,
        eval_results=results or None,
        ignore_metadata_errors=True,
        **known,
    )


def _front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of the card that is there, the original's or an earlier one of ours; empty if it has none."""
    import yaml
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    if _content(path) is None:
        return {}
    try:
        return _object(metadata_load(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _opening(base: ModelResult, point: SweepPoint, base_name: str) -> str:
    saved = f" Its KV cache takes {point.cache_ratio:.1%} of the original's memory." if point.cache_ratio else ""
    return (
        f"{_plain(base_name)} converted to grouped-query attention: {base.kv_heads} KV heads became {point.groups}, "
        f"shared by {base.query_heads} query heads.{saved} It is stored as transformers stores models."
    )


def _where(record: dict[str, Any], folder: Path) -> str:
    """In which engines a model converted this way was seen to compute what it should, and in which not."""
    config = _object(read_json(folder / "config.json"))
    source = _object(record.get("conversion")).get("model_type", config.get("model_type"))
    lines = where_it_runs(str(source), str(config.get("model_type")))
    if not lines:
        return "No engine but transformers was checked with models of this family."
    tested = "Checked with random models of this family, against transformers:"
    return "\n".join([tested, "", *(f"- {line[0].upper()}{line[1:]}." for line in lines)])


def _loading(folder: Path) -> str:
    config = _object(read_json(folder / "config.json"))
    remote = ", trust_remote_code=True" if config.get("auto_map") else ""
    auto = "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"
    return (
        f"```python\nfrom transformers import AutoTokenizer, {auto}\n\n"
        'folder = "..."  # this folder, or the name of this repository\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(folder{remote})\n```"
    )


def _numbers(base: ModelResult, point: SweepPoint, measured: Evaluation, detail: Detail) -> str:
    shown = metrics.shown("card", [point.figures])
    lines = ["| | original | this model |", "|---|---|---|", f"| KV heads | {base.kv_heads} | {point.groups} |"]
    for metric in (metric for metric in shown if metric.of == "model"):
        cells = (metric.cell(figures.get(metric.name)) for figures in (base.figures, point.figures))
        unit = f", {metric.unit}" if metric.unit else ""
        lines.append(f"| {metric.label}{unit} | {' | '.join(cells)} |")
    pair = [metric for metric in shown if metric.of == "pair"]
    lines += ["", "| beside the original | |", "|---|---|"] if pair else []
    lines += [f"| {metric.label} | {metric.cell(point.figures[metric.name])} |" for metric in pair]
    lines.append(
        f"\nOn {_plain(measured.data)}, {measured.tokens:,} tokens, {_plain(measured.dtype)}. {metrics.legend(shown)}."
    )
    if detail.timed is not None:
        lines += ["", *(f"- {_plain(line)}" for line in detail.timed.conclusions)]
        lines.append(
            f"\nDecoding measured in {_plain(detail.timed.bench.dtype)} on {_plain(detail.timed.bench.device)}."
        )
    return "\n".join(lines)


def _making(record: dict[str, Any], detail: Detail) -> str:
    tool = " ".join(_plain(value) for value in _object(record.get("tool")).values()) or "gqa-convert"
    recipe = ", ".join(
        _plain(k if v is True else f"{k} {v}") for k, v in detail.recipe.items() if v not in (None, False)
    )
    versions = ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in _object(record.get("versions")).items())
    lines = [f"Converted with {tool}: {recipe}."]
    if versions:
        lines.append(f"Versions: {versions}. `gqa_convert.json` has the whole record.")
    return " ".join(lines)
