"""The model card of a converted folder: README.md with the hub's metadata, made from what lies in the folder.

Licence, language and the like come from the original's card, which goes along as README-source.md. What the card says
of the conversion comes from `gqa_convert.json`, and what it cost from a measurement, where one was made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.checkpoint.files import MAX_CONFIG_BYTES, read_regular
from gqa_convert.checkpoint.ownership import CARD, SOURCE_CARD, is_signed, sign_card
from gqa_convert.checkpoint.reader import CONFIG, read_record
from gqa_convert.errors import CheckpointError
from gqa_convert.modeling.engines import where_it_runs

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TAGS = ("gqa", "grouped-query-attention", "gqa-convert", "kv-cache")
INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_LONGEST = 1 << 20
"""Bytes of a README.md that are looked at; cards are a hundredth of it."""


def carried_cards(names: Iterable[str], source_card: bytes | None) -> dict[str, str]:
    """Where the cards among a source's files go: by their name in the source, the name in the output.

    A card of ours is made anew and stays behind; any other README.md becomes README-source.md, and takes the next free
    name where a file of that name goes along already.

    Args:
        names: the source's files that go along, relative to its folder.
        source_card: the bytes of its README.md; None if it has none.
    """
    taken = set(names)
    if CARD not in taken:
        return {}
    if source_card is not None and is_signed(source_card):
        return {CARD: ""}
    name, number = SOURCE_CARD, 2
    while name in taken:
        name, number = f"README-source-{number}.md", number + 1
    return {CARD: name}


def read_card(folder: Path, name: str = CARD) -> bytes | None:
    """A card's bytes; None unless it is a regular file of at most 1 MiB that lies in the folder."""
    try:
        return read_regular(folder / name, _LONGEST, inside=folder)
    except (OSError, CheckpointError):
        return None


def write_card(folder: Path, record: Mapping[str, Any], quality: Mapping[str, Any] | None = None) -> None:
    """Write README.md into a converted folder, signed, by way of a file beside it.

    Args:
        folder: the converted folder, with its config.json.
        record: what its `gqa_convert.json` says, or will say.
        quality: `Quality.to_json()` of `gqa_convert.evaluate.quality`, where something was measured.

    Raises:
        OSError: if it cannot be written.
    """
    beside = folder / f".{CARD}.part"
    text = card_text(folder, record, quality).encode(errors="backslashreplace").decode()  # names that are no text
    beside.write_text(sign_card(text), encoding="utf-8")
    beside.replace(folder / CARD)


def refresh_card(folder: Path, quality: Mapping[str, Any]) -> bool:
    """Write what was measured into the card of a finished conversion, if the card is still ours.

    Returns:
        Whether it was written.
    """
    content = read_card(folder)
    if content is None or not is_signed(content):
        return False
    try:
        write_card(folder, read_record(folder) or {}, quality)
    except OSError:  # the folder is whole without
        return False
    return True


def card_text(folder: Path, record: Mapping[str, Any], quality: Mapping[str, Any] | None = None) -> str:
    """The card of a converted folder; see `write_card`."""
    config = configuration(folder)
    conversion, source = as_object(record.get("conversion")), as_object(record.get("source"))
    before, after = as_object(conversion.get("before")), as_object(conversion.get("after"))
    repo = str(as_object(source.get("hub")).get("repo_id") or "")
    name = " ".join(str(repo or source.get("name") or folder.name).split())
    heads = _heads(after)
    title = Path(name).name + (f", {heads} KV head{'s' if heads != '1' else ''}" if after else "")
    training = as_object(record.get("uptraining"))
    front = metadata(folder, repo, title, _results(config, quality))
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {plain(title)}",
        f"{plain(name)} converted to grouped-query attention: {_heads(before)} KV heads became {heads}, shared "
        f"by {after.get('query_heads')} query heads. Nothing else of the model was changed"
        + (", and the result was trained further." if training else ".")
        if after
        else f"{plain(name)}, trained further. No attention heads were merged.",
        "## What it costs\n\n" + _cost(conversion, training, quality),
        "## How to load\n\n" + loading(folder),
        "## Where it runs\n\n" + where(record, folder),
        "## How it was made\n\n" + _making(record),
    ]
    if (folder / SOURCE_CARD).is_file():
        sections.append(
            f"## The original\n\nIts card came along as [{SOURCE_CARD}]({SOURCE_CARD}): what it says of use, training "
            "data and limits holds here too; what it says of attention heads, size and scores does not."
        )
    return "\n\n".join(sections) + "\n"


def metadata(folder: Path, base_model: str, title: str, results: list[EvalResult]) -> ModelCardData:
    """The hub's metadata: licence and the like from the original's card, the relation to it, and results."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    front = front_matter(folder)
    known: dict[str, Any] = {"pipeline_tag": task(configuration(folder))}
    known |= {name: front[name] for name in INHERITED if _is_text(front.get(name))}
    try:
        validate_repo_id(base_model)
        known |= {"base_model": base_model, "base_model_relation": "finetune"} if "/" in base_model else {}
    except HFValidationError:
        pass
    return ModelCardData(
        library_name="transformers",
        tags=list(TAGS),
        model_name=title,
        eval_results=results or None,
        ignore_metadata_errors=True,
        **known,
    )


def front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of the original's card, or of the card that is there; empty if it has none that can be read."""
    import yaml

    name = next((name for name in (SOURCE_CARD, CARD) if (folder / name).is_file()), CARD)
    content = read_card(folder, name)
    match = re.match(rb"\s*---\r?\n(.*?)\r?\n---\r?\n", (content or b"") + b"\n", re.DOTALL)
    if match is None:
        return {}
    try:
        return as_object(yaml.safe_load(match[1].decode("utf-8")))
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}


def configuration(folder: Path) -> dict[str, Any]:
    """A folder's config.json; empty if it cannot be read."""
    import json

    try:
        return as_object(json.loads(read_regular(folder / CONFIG, MAX_CONFIG_BYTES, inside=folder)))
    except (OSError, ValueError, RecursionError, CheckpointError):
        return {}


def task(config: Mapping[str, Any]) -> str:
    """The hub's word for what a model of this configuration does, where the original's card does not say."""
    if "whisper" in str(config.get("model_type")):
        return "automatic-speech-recognition"
    if "vision_config" in config:
        return "image-text-to-text"
    return "text2text-generation" if config.get("is_encoder_decoder") else "text-generation"


def loading(folder: Path) -> str:
    """How the folder is loaded, in markdown."""
    config = configuration(folder)
    remote = ", trust_remote_code=True" if config.get("auto_map") else ""
    kind = task(config)
    auto, reader = {
        "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoProcessor"),
        "image-text-to-text": ("AutoModelForImageTextToText", "AutoProcessor"),
        "text2text-generation": ("AutoModelForSeq2SeqLM", "AutoTokenizer"),
    }.get(kind, ("AutoModelForCausalLM", "AutoTokenizer"))
    variable = "processor" if reader == "AutoProcessor" else "tokenizer"
    return (
        f"```python\nfrom transformers import {auto}, {reader}\n\n"
        'folder = "..."  # this folder, or the name of this repository\n'
        f"{variable} = {reader}.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(folder{remote})\n```"
    )


def where(record: Mapping[str, Any], folder: Path) -> str:
    """In which engines a model converted this way was seen to compute what it should, and in which not."""
    written = str(configuration(folder).get("model_type"))
    lines = where_it_runs(str(as_object(record.get("conversion")).get("model_type", written)), written)
    if not lines:
        return "No engine but transformers was checked with models of this family."
    checked = ["Checked with random models of this family, against transformers:", ""]
    checked += [f"- {line[0].upper()}{line[1:]}." for line in lines]
    if any(line.startswith("checked, right") and "vLLM" in line for line in lines):
        checked += ["", "To serve it: `vllm serve FOLDER` (or the name of this repository)."]
    return "\n".join(checked)


def recipe_line(recipe: Mapping[str, Any]) -> str:
    """A recipe's choices in one line."""
    return ", ".join(plain(k if v is True else f"{k} {v}") for k, v in recipe.items() if v not in (None, False))


def made_by(record: Mapping[str, Any]) -> str:
    """The program that converted, with its version."""
    return " ".join(plain(value) for value in as_object(record.get("tool")).values()) or "gqa-convert"


def versions_line(record: Mapping[str, Any]) -> str:
    """The versions at work, in one line; empty if the record tells of none."""
    return ", ".join(f"{plain(key)} {plain(value)}" for key, value in as_object(record.get("versions")).items())


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def plain(text: object) -> str:
    """Text that markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _heads(layout: Mapping[str, Any]) -> str:
    """The KV heads of a layout as a record tells of it: `8`, or `2 to 8` where layers have different numbers."""
    per_layer = layout.get("kv_heads_per_layer")
    if isinstance(per_layer, list) and len(set(per_layer)) > 1:
        return f"{min(per_layer)} to {max(per_layer)}"
    return str(layout.get("kv_heads"))


def _results(config: Mapping[str, Any], quality: Mapping[str, Any] | None) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    if quality is None or quality.get("loss_after") is None:
        return []
    names = {"loss": "loss, nats per token", "perplexity": "perplexity"}
    return [
        EvalResult(
            task_type=task(config),
            dataset_type="text",
            dataset_name=str(quality["sample"]),
            metric_type=metric,
            metric_name=label,
            metric_value=float(quality[f"{metric}_after"]),
        )
        for metric, label in names.items()
    ]


def _cost(conversion: Mapping[str, Any], training: Mapping[str, Any], quality: Mapping[str, Any] | None) -> str:
    lines = []
    losses = as_object(training.get("held_out_loss"))
    if training:
        said = ", ".join(f"{plain(name)} {value:.4f}" for name, value in losses.items() if isinstance(value, float))
        tokens = training.get("tokens")
        lines.append(
            (
                f"Trained on {tokens:,} tokens{' after the conversion' if conversion.get('after') else ''}. "
                if isinstance(tokens, int)
                else ""
            )
            + (f"Held-out loss, nats per token: {said}." if said else "")
        )
    if quality is not None and quality.get("loss_after") is not None:
        before, after = float(quality["loss_before"]), float(quality["loss_after"])
        lines.append(
            "| | original | this model |\n|---|--:|--:|\n"
            f"| loss, nats per token | {before:.4f} | {after:.4f} |\n"
            f"| perplexity | {math.exp(min(before, 700)):.4g} | {math.exp(min(after, 700)):.4g} |"
        )
        lines.append(
            f"On {quality['tokens']:,} tokens of {plain(quality['sample'])}: {plain(quality['verdict'])}. A short "
            "sample says how much was lost, not what the model is good for."
        )
    elif not training:
        merged = as_object(conversion.get("before")) != as_object(conversion.get("after"))
        lines.append(
            "**Not measured.** Merging heads loses quality until a model is trained further; measure it before it is "
            "used: `gqa eval ORIGINAL FOLDER --data TEXT`."
            if merged
            else "Nothing was merged, so nothing was lost."
        )
    return "\n\n".join(line for line in lines if line)


def _making(record: Mapping[str, Any]) -> str:
    conversion = as_object(record.get("conversion"))
    if not conversion.get("after"):
        return "Trained with `gqa uptrain`. `gqa_convert.json` has the whole record."
    recipe = as_object(conversion.get("recipe")) or {"method": conversion.get("method")}
    heads = _heads(as_object(conversion.get("after")))
    lines = [f"Converted with {made_by(record)}: {recipe_line(recipe)}, {heads} KV heads."]
    seen = versions_line(record)
    lines += [f"Versions: {seen}."] if seen else []
    lines.append("`gqa_convert.json` has the whole record; `gqa verify ORIGINAL FOLDER` checks the folder against it.")
    return " ".join(lines)
