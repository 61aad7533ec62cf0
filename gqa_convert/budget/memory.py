"""What training holds on each device: weights, gradients, optimiser, teacher, activations, logits. No torch.

Counted from sizes and from what the training loop keeps, with what a process holds before there is a model and what an
allocator keeps of what was freed. `scripts/bench/train_memory.py` holds the count to measured runs on a CPU. What is
not counted: on a GPU fragmentation, and buffers of the communication library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gqa_convert.budget.shape import ModelShape
from gqa_convert.errors import UsageError

ENGINES = ("single", "ddp", "fsdp2", "deepspeed")
PRECISIONS = ("bf16", "float32", "pure_bf16")
LOGIT_BYTES = 1 << 27
"""Bytes of one float32 array of logits, unless a chunk's positions are set outright: 1,024 at 32k words."""
LONGEST_CHUNK = 1024
_LOSS_ARRAYS, _DISTIL_ARRAYS = 3, 5
"""Arrays of the size of a chunk's logits that live at once, by cross-entropy and by distillation."""
_SHARDED = ("fsdp2", "deepspeed")
DEVICES = ("cuda", "cpu")
_PROCESS_BYTES = {"cpu": 380 * 10**6, "cuda": 512 << 20}
"""Held before there is a model. On a CPU Python, torch, transformers and their dependencies, as measured (torch 2.13,
transformers 5.23); on a GPU the CUDA context and the kernels that were loaded, which torch's own counters leave out."""
_CPU_HOLES = 192 << 20
"""What glibc's heap keeps of what was freed: arrays up to 32 MiB come from it, and later ones of other sizes do not
fill their places. Larger ones are given back at once, so it does not grow with the model: 170 to 230 MB as measured."""
_CPU_SCATTERED = 0.5
"""Share of the activations that a CPU's heap gets anew where gradients stay from one forward pass to the next: they lie
among what is freed, and cut it up."""


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits are held at a time: as many as fit into `LOGIT_BYTES`, `LONGEST_CHUNK` at most."""
    return max(1, min(LONGEST_CHUNK, LOGIT_BYTES // (4 * max(1, vocabulary))))


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it.

    Attributes:
        engine: one of `ENGINES`.
        devices: that share the work.
        context: tokens of a sequence.
        micro_batch: sequences of a forward pass on one device.
        accumulation: forward passes of a step on one device.
        precision: one of `PRECISIONS`; see `train.precision`.
        parameters: `all`, `attention` or `lora`; what is trained.
        trained: how many parameters that are; None to count them from the shape.
        state_bytes: of the optimiser, per trained parameter.
        checkpointing: activations are computed again in the backward pass.
        chunk: positions whose logits are held at a time; None for `chunk_positions`.
        teacher_bytes: of a weight of the teacher.
        hidden: hidden states of all layers are compared.
        step_sync: FSDP2 sums gradients once a step, and keeps them whole until then.
        averages: an average of the trained weights is kept, in float32.
        device: one of `DEVICES`.
    """

    engine: str = "single"
    devices: int = 1
    context: int = 2048
    micro_batch: int = 1
    accumulation: int = 8
    precision: str = "bf16"
    parameters: str = "all"
    trained: int | None = None
    state_bytes: int = 8
    checkpointing: bool = False
    chunk: int | None = None
    teacher_bytes: int = 2
    hidden: bool = False
    step_sync: bool = False
    averages: bool = False
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(f"engine {self.engine!r}: choose one of {', '.join(ENGINES)}.")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}.")
        if self.device not in DEVICES:
            raise UsageError(f"device {self.device!r}: choose one of {', '.join(DEVICES)}.")
        if self.devices < 1 or self.micro_batch < 1 or self.context < 1:
            raise UsageError("memory: devices, micro_batch and context must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each device.

    Attributes:
        weights: of the model, this device's share.
        computing: copies of weights that are computed with: bf16 ones under autocast, layers gathered by an engine.
        gradients: with the buckets that DDP exchanges them in.
        optimizer: its state.
        teacher: its weights, this device's share and what is gathered of it.
        activations: kept for the backward pass of one micro-batch.
        logits: of a chunk of positions, with the gradient of the output matrix.
        average: of the weights, this device's share.
        reference: the model whose loss is measured once before training, and is then let go.
        process: what is held before there is a model.
        allocator: what was freed and is not given back, where that is known.
        peak: the most that is held at once.
    """

    engine: str
    devices: int
    weights: int
    computing: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    average: int
    reference: int
    process: int
    allocator: int
    peak: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def training_memory(
    shape: ModelShape, setup: TrainingSetup, teacher: ModelShape | None = None, *, reference: ModelShape | None = None
) -> TrainingMemory:
    """Count what a device holds.

    Args:
        shape: the model that is trained.
        setup: how.
        teacher: the original, when distilling.
        reference: a further model, in float32, that is scored before training.

    Raises:
        UsageError: if the shape does not say how wide the model is.
    """
    if not shape.hidden_size or not shape.vocab_size:
        raise UsageError(f"{shape.name}: its width or vocabulary is not known, so its memory cannot be counted.")
    share = setup.devices if setup.engine in _SHARDED else 1
    master = 2 if setup.precision == "pure_bf16" else 4
    narrow = 4 if setup.precision == "float32" else 2
    trained = _trained(shape, setup)
    weights = shape.parameters * master // share
    edges = _edge_parameters(shape)
    computing = 0
    if setup.engine in _SHARDED:
        # Two layers at a time, the one at work and the one that is fetched, and what lies outside of layers.
        computing = (2 * _layer_parameters(shape) + edges) * narrow
    elif setup.precision == "bf16":
        computing = shape.matmul_parameters * narrow  # autocast keeps its copies until the backward pass
    gradients = trained * master // share
    if setup.engine == "ddp":
        gradients *= 2
    elif setup.engine in _SHARDED:
        in_flight = min(trained, 2 * _layer_parameters(shape) + edges)
        gradients += (trained if setup.step_sync and setup.engine == "fsdp2" else in_flight) * 4
    taught = 0
    if teacher is not None:
        gathered = 2 * _layer_parameters(teacher) + _edge_parameters(teacher) if setup.engine == "fsdp2" else 0
        split = setup.devices if setup.engine == "fsdp2" else 1
        taught = teacher.parameters * setup.teacher_bytes // split + gathered * setup.teacher_bytes
    optimizer = trained * setup.state_bytes // share
    activations = _activations(shape, setup, narrow)
    logits = _logits(shape, setup, narrow, distil=teacher is not None)
    average = trained * 4 // share if setup.averages else 0
    compared = 0 if reference is None else reference.parameters * 4 // (setup.devices if setup.engine == "fsdp2" else 1)
    # Gradients appear while activations go, but what is freed is in pieces of other sizes: both are there in full.
    training = optimizer + computing + gradients + activations + logits
    # Before the first step the reference is beside the model, and only logits with them; no gradient is taken.
    process = _PROCESS_BYTES[setup.device]
    allocator = 0
    if setup.device == "cpu":
        allocator = _CPU_HOLES + (round(_CPU_SCATTERED * activations) if setup.accumulation > 1 else 0)
    return TrainingMemory(
        engine=setup.engine,
        devices=setup.devices,
        weights=weights,
        computing=computing,
        gradients=gradients,
        optimizer=optimizer,
        teacher=taught,
        activations=activations,
        logits=logits,
        average=average,
        reference=compared,
        process=process,
        allocator=allocator,
        peak=process + allocator + weights + taught + average + max(training, compared + computing + logits),
    )


def memory_rows(memory: TrainingMemory, capacity: int | None = None) -> list[tuple[str, str]]:
    """A device's memory as label and value, for a table.

    Args:
        memory: the count.
        capacity: of a device, in bytes; None where it is not known.
    """
    from gqa_convert.console import size

    apart = {"engine", "devices", "peak"}
    named = [name for name in memory.to_json() if name not in apart]
    parts = ", ".join(f"{name} {size(getattr(memory, name))}" for name in named if getattr(memory, name))
    beside = ""
    if capacity is not None:
        beside = f" of {size(capacity)}" + ("" if memory.peak <= capacity else " (TOO MUCH)")
    where = memory.engine if memory.devices == 1 else f"{memory.engine} x {memory.devices}"
    return [(f"memory, {where}", f"{size(memory.peak)}{beside} on each device: {parts}")]


def _layer_parameters(shape: ModelShape) -> int:
    return max(0, shape.parameters - _edge_parameters(shape)) // max(1, shape.layers)


def _edge_parameters(shape: ModelShape) -> int:
    """Embedding and output matrix: one where they are tied."""
    return shape.vocab_size * shape.hidden_size * (1 if shape.matmul_parameters == shape.parameters else 2)


def _attention_parameters(shape: ModelShape) -> int:
    """Of one layer's projections."""
    return shape.hidden_size * 2 * (shape.attention_width + shape.kv_width)


def _trained(shape: ModelShape, setup: TrainingSetup) -> int:
    if setup.trained is not None:
        return setup.trained
    if setup.parameters == "all":
        return shape.parameters
    attention = shape.layers * _attention_parameters(shape)
    # Adapters of the usual rank 16 on each projection.
    return attention if setup.parameters == "attention" else shape.layers * 4 * 2 * 16 * shape.hidden_size


def _activations(shape: ModelShape, setup: TrainingSetup, narrow: int) -> int:
    """What a forward pass keeps for the backward pass; the block is Llama's: two norms, attention, a gated MLP."""
    tokens = setup.context * setup.micro_batch
    width = shape.hidden_size
    inner = max(0, _layer_parameters(shape) - _attention_parameters(shape)) // (3 * width)
    learns_mlp = setup.parameters == "all"
    # A norm computes in float32: its input, and what its weight is multiplied with if that is learnt.
    norms = 2 * width * (4 + narrow * learns_mlp)
    # Its input, rotated queries, keys and values (repeated for as many heads), what attention gives, and its input.
    attention = (width + 4 * shape.attention_width) * narrow + width * narrow
    gated = (3 * inner + (inner + width) * learns_mlp) * narrow
    each = norms + attention + gated
    if setup.checkpointing:
        return tokens * (shape.layers * width * narrow + each)
    return tokens * (shape.layers * each + 3 * width * 4)


def _logits(shape: ModelShape, setup: TrainingSetup, narrow: int, *, distil: bool) -> int:
    chunk = min(setup.chunk or chunk_positions(shape.vocab_size), setup.context * setup.micro_batch)
    arrays = _DISTIL_ARRAYS if distil else _LOSS_ARRAYS
    matrix = shape.vocab_size * shape.hidden_size
    learns_head = setup.parameters == "all"
    by_weight = matrix * 4 * learns_head  # kept until the backward pass hands it on
    hidden = setup.context * setup.micro_batch * shape.hidden_size * narrow * (shape.layers if setup.hidden else 1)
    return chunk * shape.vocab_size * (4 * arrays + (0 if narrow == 4 else narrow)) + by_weight + hidden
