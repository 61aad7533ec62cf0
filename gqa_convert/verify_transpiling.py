"""Check that a view of a checkpoint in another family's terms computes what the stored model does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gqa_convert.anatomy import transformers_api
from gqa_convert.calibrate.weights import whole_model
from gqa_convert.errors import VerificationError
from gqa_convert.modeling.transpile.view import widened

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.anatomy.anatomy import Anatomy
    from gqa_convert.checkpoint.reader import Checkpoint

LOGIT_TOLERANCE = 1e-4
"""Largest accepted logit difference, as a share of the largest logit."""


def verify_transpiling(view: Checkpoint, anatomy: Anatomy, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Run the stored model and the view of it with all its heads, in float32, one after the other.

    The view must compute the same before its tensors are rounded to the stored dtype; what rounding adds is reported.

    Returns:
        `transpiling_difference` and `transpiling_rounding`: largest logit differences without and with rounding.

    Raises:
        VerificationError: if the view computes something else.
    """
    assert view.stored is not None
    expected = _stored_logits(view.stored, inputs)
    scale = max(float(expected.abs().max()), 1e-30)
    exact, rounded = (
        float((_view_logits(each, anatomy, inputs) - expected).abs().max()) for each in (widened(view), view)
    )
    if not exact <= LOGIT_TOLERANCE * scale:
        raise VerificationError(
            f"{view.folder}: written as {anatomy.model_type}, its logits differ by {exact:.3g} at scale {scale:.3g}."
        )
    return {"transpiling_difference": exact, "transpiling_rounding": rounded}


def _stored_logits(stored: Checkpoint, inputs: dict[str, Tensor]) -> Tensor:
    import torch

    config = transformers_api.load_config(stored.folder, trust_remote_code=False)
    cls: Any = transformers_api.model_class(config)
    with transformers_api.quiet():
        model = cls.from_pretrained(stored.folder, dtype=torch.float32, local_files_only=True).eval()
    return _logits(model, inputs)


def _view_logits(view: Checkpoint, anatomy: Anatomy, inputs: dict[str, Tensor]) -> Tensor:
    import torch

    cls = transformers_api.model_class(anatomy.config)
    return _logits(whole_model(view, cls, anatomy.config, dtype=torch.float32), inputs)


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    import torch

    with torch.no_grad():
        found: Tensor = model(**inputs, use_cache=False).logits
    return found
