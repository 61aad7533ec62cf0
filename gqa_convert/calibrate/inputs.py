"""The calibration inputs that a recipe asks for: text tokenised, or text that the source writes itself (kept)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.report import OnLayer
from gqa_convert.calibrate.self_text import own_outputs, self_tokens
from gqa_convert.calibrate.store import LayerStore, identity
from gqa_convert.calibrate.tokens import calibration_tokens, token_hash, window_plan
from gqa_convert.errors import UsageError
from gqa_convert.recipe import SELF

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.checkpoint.reader import Checkpoint
    from gqa_convert.recipe import Recipe

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_ANSWER_SHARE = 4  # an encoder-decoder's answers are as long as its inputs over this
_CACHE_BYTES = 4 << 30  # of the KV cache while the source writes text
_MOST_WINDOWS = 256  # written at a time


def calibration_inputs(
    recipe: Recipe,
    checkpoint: Checkpoint,
    config: Any,
    *,
    work: Path,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_layer: OnLayer | None = None,
) -> dict[str, Tensor] | None:
    """Return the arguments of the forward passes that a recipe calibrates on; None if it calibrates on nothing.

    Windows are as long as the recipe says or the model's context allows; where that is shorter there are more of them,
    so that the number of tokens stays. Text from the source itself is kept in `work`.

    Returns:
        `input_ids` (N, T); for an encoder-decoder `input_ids` (N, S) and its own answers, `decoder_input_ids`.

    Raises:
        UsageError: if the text does not fill one window, or an encoder-decoder is to write its own.
        HubError: if a hub dataset cannot be read.
    """
    if recipe.calibrate is None:
        return None
    sequences, length = window_plan(max_positions(config), sequences=recipe.sequences, length=recipe.length)
    answers = bool(getattr(config, "is_encoder_decoder", False))
    if recipe.calibrate == SELF and answers:
        raise UsageError(
            f"--calibrate {SELF}: {config.model_type} is an encoder-decoder and cannot write text from nothing. "
            "Name a file, a folder or a hub dataset with texts such as it is used on."
        )
    tokens = None
    if recipe.calibrate != SELF:
        tokens = calibration_tokens(
            recipe.calibrate,
            checkpoint.folder,
            sequences=sequences,
            length=length,
            seed=recipe.seed,
            trust_remote_code=trust_remote_code,
        )
        if not answers:
            return {"input_ids": tokens}
    text = None if tokens is None else token_hash(tokens)
    key = {"source": identity(checkpoint), "shape": [sequences, length], "seed": recipe.seed, "text": text}
    store = LayerStore(work, "text", key)
    kept = store.read(0)
    if kept is not None:
        return kept[0]
    batch = written_at_once(config, length, sequences)
    found: Mapping[str, Tensor]
    if tokens is None:
        found = {
            "input_ids": self_tokens(
                checkpoint.folder,
                sequences=sequences,
                length=length,
                seed=recipe.seed,
                batch=batch,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=_windows(on_layer, sequences),
            )
        }
    else:
        found = own_outputs(
            checkpoint.folder,
            tokens,
            length=max(2, length // _ANSWER_SHARE),
            seed=recipe.seed,
            batch=batch,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=_windows(on_layer, len(tokens)),
        )
    store.write(0, found, {})
    return dict(found)


def max_positions(config: Any) -> int | None:
    """The model's context in tokens; None where its configuration states none."""
    text = config.get_text_config(decoder=True)
    for name in _POSITIONS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
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
            on_layer("writing calibration text", done, total)

    return progress
