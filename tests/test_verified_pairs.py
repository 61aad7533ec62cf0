"""`gqa verify SRC DST` for every kind of conversion: it holds for a sound one, and finds one flipped byte anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gqa_convert import convert
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.conversion.compare import compare_tensors
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.conversion.recipe import Recipe, make_recipe
from gqa_convert.conversion.recorded import read_record, recorded_plan
from gqa_convert.errors import VerificationError
from gqa_convert.tiny.model import tiny_model
from gqa_convert.tiny.shrink import tiny_config
from tests.support import Command
from tests.uptrain.conftest import WORDS, make_tiny

Pair = tuple[Path, Path]
SMALL = {"sequences": 8, "length": 32, "refit_steps": 3, "refit_tokens": 64}


def converted(folder: Path, *, model_type: str = "llama", recipe: Recipe | None = None, **chosen: Any) -> Pair:
    tiny_model(tiny_config(model_type)).save_pretrained(folder / "source")
    return folder / "source", convert(folder / "source", groups=2, recipe=recipe, out=folder / "out", **chosen).out


def uptrained(folder: Path, *, parameters: str = "all", recipe: Recipe | None = None) -> Pair:
    from gqa_convert.uptrain import loop
    from gqa_convert.uptrain.read_config import parse_config

    source = make_tiny(folder / "source", kv_heads=4)
    (source / "gqa_convert.json").unlink()
    out = convert(source, groups=2, recipe=recipe, out=folder / "out").out
    text = folder / "text.jsonl"
    documents = [" ".join(WORDS[n * k % len(WORDS)] for k in range(1, 30 + n)) for n in range(60)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    settings = {
        "model": str(out),
        "output": str(folder / "run"),
        "budget": {"steps": 2},
        "data": {"source": str(text), "context": 16, "held_out_fraction": 0.3},
        "schedule": {"kind": "cosine", "peak": 1e-3},
        "train": {
            "batch_sequences": 2,
            "micro_batch": 2,
            "precision": "float32",
            "device": "cpu",
            "parameters": parameters,
        },
        "evaluation": {"tokens": 32},
    }
    return source, loop.uptrain(parse_config(settings), quiet=True).folder


SEARCHED = Recipe(method="pca", grouping="search")
KINDS: dict[str, tuple[Callable[[Path], Pair], set[str]]] = {
    "mean": (converted, {"identical", "merged"}),
    "first": (partial(converted, method="first"), {"identical", "merged"}),
    "random": (partial(converted, method="random", seed=7), {"identical", "merged"}),
    "aligned": (partial(converted, method="aligned"), {"identical", "solved"}),
    "pca": (partial(converted, method="pca"), {"identical", "solved"}),
    "searched groups": (partial(converted, recipe=SEARCHED), {"identical", "solved"}),
    "searched mean of OLMo 2": (
        partial(converted, model_type="olmo2", recipe=Recipe(grouping="search")),
        {"identical", "solved"},
    ),
    "pca of OLMo 2": (partial(converted, model_type="olmo2", method="pca"), {"identical", "merged", "solved"}),
    "fast": (partial(converted, recipe=make_recipe("fast", **SMALL)), {"identical", "solved"}),
    "best": (partial(converted, recipe=make_recipe("best", **SMALL)), {"identical", "solved"}),
    "least squares": (
        partial(converted, recipe=make_recipe("best", **{**SMALL, "refit_steps": 0})),
        {"identical", "solved"},
    ),
    "transpiled Pythia": (partial(converted, model_type="gpt_neox"), {"identical", "rewritten", "merged"}),
    "random Pythia": (
        partial(converted, model_type="gpt_neox", method="random"),
        {"identical", "rewritten", "merged"},
    ),
    "shipped T5": (partial(converted, model_type="t5"), {"identical", "merged"}),
    "uptrained": (uptrained, {"trained"}),
    "attention uptrained": (partial(uptrained, parameters="attention"), {"identical", "trained"}),
    "searched, uptrained": (partial(uptrained, parameters="attention", recipe=SEARCHED), {"identical", "trained"}),
}


@contextmanager
def flipped_byte(info: Any) -> Iterator[None]:
    """Flip the lowest bit in the middle of a stored tensor."""
    with open(info.file, "r+b") as file:
        at = info.offset + info.nbytes // 8 * 4
        at = min(at, info.offset + info.nbytes - 1)
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))
        file.flush()
        try:
            yield
        finally:
            file.seek(at)
            file.write(old)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_pair_holds_and_a_flipped_byte_in_any_tensor_is_found(
    kind: str, tmp_path: Path, command: Command
) -> None:
    make, ways = KINDS[kind]
    source, out = make(tmp_path)
    checks = verify_pair(source, out)
    written = Checkpoint.open(out)
    counted = {way: checks[way] for way in ("identical", "rewritten", "merged", "solved", "trained")}
    assert {way for way, count in counted.items() if count} == ways
    assert sum(counted.values()) == len(written.tensors) == checks["tensors"]
    assert checks["recomputed"] == checks["merged"] + checks["rewritten"]
    assert checks["recorded_hash"] == checks["solved"] + checks["trained"]
    assert (checks["unproven"], checks["differing"]) == (0, [])
    finished = command("gqa", "verify", source, out, "--logits", "--json")
    assert finished.code == 0, finished.err
    assert json.loads(finished.out)["logit_difference"] <= 1e-4 * json.loads(finished.out)["logit_scale"]

    record = read_record(out)
    planned = recorded_plan(source, out, record)
    for key, info in written.tensors.items():
        with flipped_byte(info):
            comparison = compare_tensors(planned, written, record)
        assert comparison.damaged + comparison.differing == [key]
    key = sorted(written.tensors)[len(kind) % len(written.tensors)]
    with flipped_byte(written.tensors[key]):
        finished = command("gqa", "verify", source, out)
    assert (finished.code, len(finished.err.splitlines())) == (3, 1)
    assert key in finished.err
    assert verify_pair(source, out) == checks


def test_records_without_hashes_are_checked_as_far_as_can_be(tmp_path: Path) -> None:
    source, out = converted(tmp_path, method="pca")
    record = json.loads((out / "gqa_convert.json").read_text())
    del record["solved"]
    (out / "gqa_convert.json").write_text(json.dumps(record))
    checks = verify_pair(source, out)
    assert (checks["recorded_hash"], checks["unproven"]) == (0, checks["solved"])
    info = next(info for key, info in Checkpoint.open(out).tensors.items() if key.endswith("k_proj.weight"))
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\x00\x00\x80\x7f")  # infinity
    with pytest.raises(VerificationError, match=r"k_proj\.weight is not .* or not finite"):
        verify_pair(source, out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"conversion": 3}, "'conversion' is a int"),
        ({"conversion": {"recipe": {"method": "mean", "colour": 1}}}, "colour: no such choice"),
        ({"conversion": {"recipe": {"method": "none"}}}, "no such merge method"),
        ({"conversion": {"recipe": [1]}}, "'recipe' holds a list"),
        ({"conversion": {"recipe": {"method": "mean", "sequences": "x"}}}, "of the wrong kind"),
        ({"solved": [1]}, "'solved' holds a list"),
    ],
)
def test_a_damaged_record_is_named(damage: dict[str, Any], message: str, tmp_path: Path, command: Command) -> None:
    source, out = converted(tmp_path)
    record = json.loads((out / "gqa_convert.json").read_text()) | damage
    (out / "gqa_convert.json").write_text(json.dumps(record))
    finished = command("gqa", "verify", source, out)
    assert (finished.code, len(finished.err.splitlines())) == (4, 1)
    assert message in finished.err
    assert "gqa_convert.json" in finished.err


def test_a_recipe_reads_back_what_it_wrote() -> None:
    for name in ("paper", "fast", "best"):
        recipe = make_recipe(name, seed=3)
        again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
        assert again.to_json() == recipe.to_json()
        assert again.uses_blocks == recipe.uses_blocks
