"""The calibration inputs that a recipe asks for: text or sound, or text that the source writes itself (kept)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.report import OnLayer
from gqa_convert.calibrate.self_text import own_answers, self_tokens
from gqa_convert.calibrate.store import LayerStore, identity
from gqa_convert.calibrate.tokens import calibration_tokens, document_rows, token_hash, window_plan
from gqa_convert.errors import UnsupportedModelError, UsageError
from gqa_convert.hf.loading import load_feature_extractor, max_positions
from gqa_convert.modeling.shipping import TYPE_PREFIX
from gqa_convert.progress import WRITING_TEXT

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.conversion.recipe import Recipe
    from gqa_convert.hf.loading import Source

_CACHE_BYTES = 4 << 30  # of the KV cache while the source writes text
_MOST_WINDOWS = 256  # written at a time
_SOUND = ("input_features", "input_values")  # main inputs of models that listen
HEARD = ("whisper",)
"""Model types that listen and can be calibrated: others want more than features and a transcript, or were not tried."""


def listens(source: Source) -> bool:
    """True for an encoder-decoder whose encoder is given sound."""
    return _reads(source) in _SOUND


def _reads(source: Source) -> str:
    """What an encoder-decoder's encoder is given, as transformers names it; empty for a decoder alone."""
    if not getattr(source.config, "is_encoder_decoder", False):
        return ""
    return str(getattr(source.as_stored.meta_model, "main_input_name", "input_ids"))


def check_calibration(recipe: Recipe, source: Source) -> None:
    """Refuse what a source cannot be calibrated on, before anything long begins.

    Raises:
        UnsupportedModelError: if it can be calibrated on nothing.
        UsageError: if it can, but not on what the recipe names.
        CheckpointError: if what turns sound into features is not in the folder.
    """
    reads = _reads(source)
    if recipe.calibrate is None or not reads:
        return
    model_type = source.model_type.removeprefix(TYPE_PREFIX)
    if reads not in (*_SOUND, "input_ids"):
        raise UnsupportedModelError(
            f"{model_type}: its encoder is given {reads}, not text or sound, so there is nothing to calibrate it on. "
            "Convert it with --preset paper and train it afterwards."
        )
    if reads in _SOUND and model_type not in HEARD:
        raise UnsupportedModelError(
            f"{model_type}: it listens, and of such models only {', '.join(HEARD)} can be calibrated. Convert it with "
            "--preset paper and train it afterwards."
        )
    if reads in _SOUND:
        from gqa_convert.data.sound import SOUND_FORMS, local_files

        if recipe.self_written:
            raise UsageError(f"--calibrate {recipe.calibrate}: {model_type} listens. Name {SOUND_FORMS}.")
        local_files(str(recipe.calibrate))
        load_feature_extractor(source.folder, trust_remote_code=source.trust_remote_code)
    elif recipe.self_written:
        raise UsageError(
            f"--calibrate {recipe.calibrate}: {model_type} is an encoder-decoder and cannot write text from "
            "nothing. Name a file, a folder or a hub dataset with texts such as it is used on."
        )


def calibration_inputs(
    recipe: Recipe,
    source: Source,
    *,
    work: Path,
    device: str = "cpu",
    on_layer: OnLayer | None = None,
) -> list[dict[str, Tensor]] | None:
    """Return the arguments of the forward passes that a recipe calibrates on; None if it calibrates on nothing.

    For a decoder, windows as long as the recipe says or the model's context allows; where that is shorter there are
    more of them, so that the number of tokens stays. For an encoder-decoder, documents one by one, as many tokens of
    them in all, and its own answers; for one that listens, windows of sound and its own transcripts. What the source
    writes is kept in `work`.

    Returns:
        One entry a shape: `input_ids` (N, T); for an encoder-decoder `input_ids` (N, S), or a listener's features,
        and `decoder_input_ids` (N, T).

    Raises:
        UsageError: if the text does not fill one window.
        HubError: if a hub dataset cannot be read.
        GQAConvertError: as `check_calibration`.
    """
    if recipe.calibrate is None:
        return None
    check_calibration(recipe, source)
    # Text is read and written by the model as it is stored, also where a view in another family's terms is merged.
    stored = source.as_stored
    config = source.config
    sequences, length = window_plan(max_positions(config), sequences=recipe.sequences, length=recipe.length)
    answers = bool(getattr(config, "is_encoder_decoder", False))
    if not recipe.self_written and not answers:
        tokens = calibration_tokens(
            recipe.calibrate, stored.tokenizer(), sequences=sequences, length=length, seed=recipe.seed
        )
        return [{"input_ids": tokens}]
    if answers and listens(source):
        return _heard_inputs(recipe, source, work=work, device=device, on_layer=on_layer)
    rows = None
    if answers:
        rows = document_rows(
            recipe.calibrate, stored.tokenizer(), tokens=sequences * length, length=length, seed=recipe.seed
        )
    text = None if rows is None else token_hash([{"input_ids": ids} for ids in rows])
    key = {"source": identity(source.checkpoint), "shape": [sequences, length], "seed": recipe.seed, "text": text}
    store = LayerStore(work, "text", key)
    kept = _kept(store)
    if kept:
        return kept
    many = sequences if rows is None else sum(map(len, rows))
    writing: dict[str, Any] = {
        "batch": written_at_once(config, length, many),
        "device": device,
        "progress": _windows(on_layer, many),
        "seed": recipe.seed,
    }
    if rows is None:
        batches = [{"input_ids": self_tokens(stored, sequences=sequences, length=length, **writing)}]
    else:
        batches = own_answers(stored, rows, **writing)
    for number, parts in enumerate(batches):
        store.write(number, parts, {"shapes": len(batches)})
    return batches


def _heard_inputs(
    recipe: Recipe, source: Source, *, work: Path, device: str, on_layer: OnLayer | None
) -> list[dict[str, Tensor]]:
    from gqa_convert.calibrate.heard import own_transcripts, recordings

    extractor = load_feature_extractor(source.folder, trust_remote_code=source.trust_remote_code)
    windows = sound_windows(recipe, source.config)
    heard = recordings(str(recipe.calibrate), extractor, windows=windows, seed=recipe.seed)
    store = LayerStore(work, "text", {"source": identity(source.checkpoint), "transcripts of": token_hash(heard)})
    return own_transcripts(source, heard, store=store, device=device, progress=_windows(on_layer, len(heard)))


_POSITIONS_A_SECOND = 50  # of Whisper's encoder


def sound_positions(config: Any) -> int:
    """Positions of the encoder that a window of sound fills."""
    return int(getattr(config, "max_source_positions", None) or 1500)


def sound_seconds(config: Any) -> float:
    """How long a window of sound is."""
    return sound_positions(config) / _POSITIONS_A_SECOND


def sound_windows(recipe: Recipe, config: Any) -> int:
    """How many windows of sound a recipe takes at most: as many positions of the encoder as it wants tokens."""
    return max(1, round(recipe.sequences * recipe.length / sound_positions(config)))


def _kept(store: LayerStore) -> list[dict[str, Tensor]] | None:
    """What an earlier run wrote, if it wrote all of it."""
    kept: list[dict[str, Tensor]] = []
    while (read := store.read(len(kept))) is not None:
        kept.append(read[0])
        if len(kept) == read[1]["shapes"]:
            return kept
    return None


def written_at_once(config: Any, length: int, sequences: int) -> int:
    """How many windows are written at a time, so that their KV cache (2 bytes a number) stays below 4 GiB."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None) or 1
    width = getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 1
    a_window = 4 * int(layers) * int(width) * length
    return max(1, min(sequences, _MOST_WINDOWS, _CACHE_BYTES // a_window))


def _windows(on_layer: OnLayer | None, total: int) -> Any:
    """Count windows for a progress callback that wants what is done of how much."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_layer:
            on_layer(WRITING_TEXT, done, total)

    return progress
