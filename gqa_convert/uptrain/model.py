"""The model that is trained: loaded, proven to keep documents apart, and wrapped so that its forward pass is the loss.

The loss is inside the wrapped forward because that is where every engine (DDP, FSDP2, DeepSpeed) has the weights whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.budget.machine import has_bfloat16
from gqa_convert.checkpoint.dtypes import not_finite
from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.uptrain.objective import Head, LossSpec, TeacherOutput, chunked_loss, hidden_cosine

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of a logit, as a share of the largest: below what a leak causes, above what another kernel does."""


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that are not numbers: nothing can be learnt from or with them.

    Args:
        model: loaded; parameters on the meta device, and those that are sharded already, are passed over.
        name: what the message calls it.

    Raises:
        CheckpointError: naming the first such tensor, and how many of its values.
    """
    for key, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "placements") or not parameter.is_floating_point():
            continue
        wrong = not_finite(parameter)
        if wrong:
            raise CheckpointError(
                f"{name}: {wrong:,} of the {parameter.numel():,} values of {key} are NaN or infinite. The "
                "checkpoint is damaged, or its training had diverged; use a sound one."
            )


def check_reads_text(model_type: str, cls: Any) -> None:
    """Refuse an encoder-decoder that is to hear or see: there is nothing to train it on here.

    Raises:
        UsageError: naming what it reads.
    """
    takes = getattr(cls, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise UsageError(
            f"{model_type}: its {cls.__name__} reads {takes}, and `gqa uptrain` has text alone to train on. Train the "
            "converted folder with the tools that the original was trained with; it is a transformers model."
        )


class ScoredModel(nn.Module):
    """A model whose forward pass returns its loss, summed over the scored positions.

    Attributes:
        model: the transformers model; its parameters keep their names under `model.`.
        spec: the loss.
        skips_head: whether logits are computed chunk by chunk here instead of by the model's own output layer.
    """

    def __init__(self, model: Any, spec: LossSpec, *, skips_head: bool | None = None) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.skips_head = can_skip_head(model) if skips_head is None else skips_head
        # Engines that shard a model ask it which of its layers belong together.
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self.config = model.config
        self._flat = is_flash(model)

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, teacher: TeacherOutput | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score a micro-batch.

        Args:
            inputs: keyword arguments of the model.
            labels: (B, T), aligned with the outputs (not to be shifted).
            teacher: what the teacher says about the same inputs.

        Returns:
            The weighted loss, and the sums of `STATISTICS` (3,) without gradient.
        """
        wants_layers = bool(self.spec.hidden_weight and teacher is not None)
        hidden, head, layers = run_model(
            self.model, inputs, skip_head=self.skips_head, flat=self._flat, layers=wants_layers
        )
        loss, sums = chunked_loss(hidden.flatten(0, 1), head, labels.flatten(), teacher, self.spec)
        cosine = loss.new_zeros(())
        if wants_layers and teacher is not None:
            cosine = hidden_cosine(layers, teacher.layers, labels.flatten())
            loss = loss + self.spec.hidden_weight * cosine
        return loss, torch.cat([sums, cosine.detach()[None]])


def run_model(
    model: Any, inputs: dict[str, Tensor], *, skip_head: bool, flat: bool = False, layers: bool = False
) -> tuple[Tensor, Head, tuple[Tensor, ...]]:
    """Run a model without cache or mask (with either, packed documents would see each other).

    Args:
        model: of transformers.
        inputs: its keyword arguments.
        skip_head: leave out the output layer and return what would have gone into it.
        flat: join the rows into one; flash attention keeps documents apart in single rows only.
        layers: also return every layer's hidden states.

    Returns:
        Hidden states or logits (B, T, D or V), the head that still has to be applied, and hidden states by layer.
    """
    rows = inputs["input_ids"].shape[0]
    if flat and "position_ids" in inputs and rows > 1:
        inputs = {key: value.reshape(1, -1) for key, value in inputs.items()}
    extra = {"output_hidden_states": True} if layers else {}
    if skip_head:
        output = model.get_output_embeddings()
        with _skipped(output):
            outputs = model(**inputs, use_cache=False, **extra)
        head = Head(output.weight, getattr(output, "bias", None))
    else:
        outputs = model(**inputs, use_cache=False, **extra)
        head = Head(None)
    states = (getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states) if layers else ()
    out = outputs.logits
    return out.reshape(rows, -1, out.shape[-1]), head, tuple(states)


def _same(x: Tensor) -> Tensor:
    return x


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    layer.forward = _same
    try:
        yield
    finally:
        del layer.forward


@torch.no_grad()
def can_skip_head(model: Any) -> bool:
    """Whether logits are the output layer's matrix product and nothing more; tried on a few tokens.

    A scale before or after it commutes with the product; a soft cap (Gemma 2) does not.
    """
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None or not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear:
        return False
    inputs = probe_inputs(model, 1, 8, restart=None)
    with evaluating(model), computing(model):
        expected = model(**inputs, use_cache=False).logits.float()
        try:
            hidden, head, _ = run_model(model, inputs, skip_head=True)
            seen = head.logits(hidden.to(layer.weight.dtype))
        except RuntimeError:  # another shape than that of logits was met, as where BART adds a bias to them
            return False
    return bool((seen - expected).abs().max() <= _tolerance(model) * expected.abs().max().clamp_min(1e-6))


@torch.no_grad()
def check_isolation(model: Any) -> float:
    """Prove that two documents in a row do not see each other: the second must score as it does alone.

    Returns:
        The largest difference of a logit, as a share of the largest.

    Raises:
        UsageError: if they do.
        CheckpointError: if the model computes no numbers to tell by.
    """
    flat = is_flash(model)
    first, length = 7, 18
    inputs = probe_inputs(model, 2, length, restart=first)
    alone = {"input_ids": inputs["input_ids"][:, first:], "position_ids": inputs["position_ids"][:, first:]}
    with evaluating(model), computing(model):
        try:
            packed = run_model(model, inputs, skip_head=False, flat=flat)[0][:, first:].float()
        except TypeError as error:
            raise UsageError(
                f"{type(model).__name__}: takes no position_ids, so packed documents cannot be kept apart. "
                "Set data.separate_documents to false."
            ) from error
        expected = run_model(model, alone, skip_head=False, flat=flat)[0].float()
    if not bool(expected.isfinite().all() and packed.isfinite().all()):
        raise CheckpointError(
            f"{type(model).__name__}: computes logits that are NaN or infinite, though its weights are finite. Its "
            f"numbers do not fit into {next(model.parameters()).dtype}, or its config.json is not that of its weights."
        )
    share = float((packed - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not share <= _tolerance(model):
        raise UsageError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed documents see each "
            f"other (logits of the second change by {share:.2g} of their size). Choose another train.attention (sdpa, "
            "eager), or set data.separate_documents to false."
        )
    return share


def _tolerance(model: Any) -> float:
    if is_flash(model):
        return _TOLERANCE[torch.bfloat16]
    return _TOLERANCE.get(next(model.parameters()).dtype, 5e-2)


def is_flash(model: Any) -> bool:
    """Whether attention is one of the flash kernels, the hub's (`kernels-community/flash-attn2`) too: 16 bits only."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def computing(model: Any) -> Any:
    """Around a trial of the model outside of the training loop: float32 weights need autocast for flash attention."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=is_flash(model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def probe_inputs(model: Any, rows: int, length: int, *, restart: int | None) -> dict[str, Tensor]:
    """A few random tokens to try a model on, in two documents if `restart` says where the second begins."""
    device = next(model.parameters()).device
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, int(text.vocab_size) - 1), (rows, length), generator=generator).to(device)
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    if restart is None:
        return {"input_ids": ids}
    positions = torch.cat([torch.arange(restart), torch.arange(length - restart)]).to(device)
    return {"input_ids": ids, "position_ids": positions.expand(rows, -1)}


def teacher_dtype(chosen: str, device: torch.device | str) -> torch.dtype:
    """What the teacher's weights are held in: what was chosen, `auto` going by what the device multiplies fast."""
    if chosen == "auto":
        chosen = "bfloat16" if has_bfloat16(torch.device(device).type) else "float32"
    return torch.bfloat16 if chosen == "bfloat16" else torch.float32


class Teacher:
    """The original model, frozen. It is kept out of the module tree, so no engine syncs or saves it."""

    def __init__(self, model: Any, *, layers: bool, skips_head: bool | None = None) -> None:
        self._model = model.requires_grad_(False).eval()
        self._skip = can_skip_head(model) if skips_head is None else skips_head
        self._layers = layers
        self._flat = is_flash(model)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> TeacherOutput:
        """Run the teacher on a micro-batch."""
        hidden, head, layers = run_model(
            self._model, inputs, skip_head=self._skip, flat=self._flat, layers=self._layers
        )
        return TeacherOutput(hidden.flatten(0, 1), head, layers)

    @property
    def model(self) -> Any:
        """The frozen model."""
        return self._model

    @property
    def vocabulary(self) -> int:
        """Size of its output distribution."""
        return int(self._model.config.get_text_config(decoder=True).vocab_size)


def attention_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers inside attention modules, by name: the projections, fused or not.

    GPT-2's `Conv1D` is one, its weight stored the other way round.

    Raises:
        UsageError: if the model has none.
    """
    projections = _projections(model)
    if not projections:
        raise UsageError(f"train.parameters: {type(model).__name__} has no linear layers in attention modules.")
    return projections


def _projections(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    inside = tuple(f"{name}." for name, module in model.named_modules() if "attention" in type(module).__name__.lower())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(name.startswith(prefix) for prefix in inside)
    }


_OUTPUTS = ("o_proj", "out_proj", "o", "wo", "dense", "c_proj", "to_out", "linear_out", "output")
"""Last names of attention's output projections; every other projection writes heads."""


def head_sides(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Ids of attention's weights that hold heads, each with the side they lie along (0: rows) and a head's width.

    A weight whose side is not a whole number of heads is left out, and so is one whose attention states no width.
    """
    from transformers.pytorch_utils import Conv1D

    sides: dict[int, tuple[int, int]] = {}
    modules = dict(model.named_modules())
    for name, projection in _projections(model).items():
        width = _head_width(modules, name)
        writes_heads = name.rpartition(".")[2] not in _OUTPUTS
        side = int(writes_heads == isinstance(projection, Conv1D))  # its weight is stored the other way round
        weight = projection.weight
        if width and isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[side] % width == 0:
            sides[id(weight)] = (side, width)
    return sides


def _head_width(modules: dict[str, nn.Module], name: str) -> int | None:
    """The width of a head that the nearest module around a projection states."""
    while name:
        name = name.rpartition(".")[0]
        for attribute in ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "attn_head_size"):
            width = getattr(modules.get(name), attribute, None)
            if isinstance(width, int) and width > 0:
                return width
    return None


def attention_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norms of queries and keys (Qwen3, Gemma 3, OLMo 2) and others inside attention modules, by name."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if "attention" in type(module).__name__.lower())
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and any(name.startswith(prefix) for prefix in inside)
        and any(True for _ in module.parameters(recurse=False))
    }


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of attention: its projections, and its norms. Raises as `attention_linears`."""
    parts = (*attention_linears(model).values(), *attention_norms(model).values())
    return [parameter for part in parts for parameter in part.parameters()]


def set_dropout(model: nn.Module, share: float) -> None:
    """Set every dropout of a model, modules and plain numbers (`attention_dropout`) alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name in ("attention_dropout", "dropout", "dropout_rate", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
