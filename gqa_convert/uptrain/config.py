"""The configuration of an uptraining run: one typed schema, its documentation beside each field.

Loading (YAML, `--set`, all problems at once) is in `loading`; what the settings amount to is in `plan`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gqa_convert.uptrain.config_data import (
    BudgetSection,
    Count,
    DataSection,
    Place,
    Positive,
    Section,
    Share,
    Source,
)
from gqa_convert.uptrain.optim import get_optimizer


class DistillationSection(Section):
    """Learn from the original model's predictions."""

    teacher: Place
    """Folder or hub id of the original."""
    weight: Positive = 1.0
    """Weight of KL(teacher || model), nats per token."""
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the language-model loss beside it."""
    temperature: Positive = 1.0
    """Both distributions are softened by it; the KL is multiplied by its square (Hinton et al. 2015)."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Compare on the teacher's k likeliest tokens only, its probabilities scaled to sum to 1."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of 1 - cosine of the two models' hidden states, averaged over layers."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The teacher's weights; auto: bfloat16 but on processors that have no instructions for it."""
    compile: bool = False
    """torch.compile the teacher."""
    cache: Place | None = None
    """What the teacher says, computed before by `gqa uptrain cache-teacher`; the teacher is then not loaded."""


class ObjectiveSection(Section):
    """What is minimised."""

    kind: Literal["causal_lm", "span_corruption", "text_to_text"] = "causal_lm"
    """Next token; for encoder-decoders T5's span corruption, or the answers of rows that are a text and its answer."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Span corruption: share of tokens that are noise."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """Span corruption: tokens of a span on average."""
    distillation: DistillationSection | None = None
    """Learn from the original too, or only."""
    loss_chunk: Annotated[int, Field(ge=1)] | None = None
    """Positions whose logits are held in float32 at a time; null: as many as fit into 128 MiB, 1,024 at most."""


def _optimizer(name: str) -> str:
    return get_optimizer(name).name


class OptimizerSection(Section):
    """The optimiser, see `optim`."""

    kind: Annotated[str, AfterValidator(_optimizer)] = "adamw"
    """adamw; adafactor, which is that of T5: updates scaled by the size of each parameter; or muon, for the matrices
    inside the model (AdamW for the rest), at AdamW's learning rates."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW (of muon: its AdamW part)."""
    eps: Positive = 1e-8
    """AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; vectors (norms, biases) are never decayed."""
    decay_embeddings: bool = False
    """Decay embeddings too; a step meets few of their rows, and decay would shrink the rest at each."""
    per_head: bool = False
    """muon: take attention head by head; a fifth of its cost and less, but a little less is learnt from a token."""
    muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """muon: what its products are computed in; many processors are far slower in bfloat16."""
    relative: bool = False
    """muon: a step is as large, beside its matrix, as the rate says (a root mean square of it), as Adafactor's are:
    where queries' weights are a tenth of the others', as T5's are, one rate suits them all. Else: beside 0.2."""
    outside_attention: Positive = 1.0
    """Learning rate of everything but the attention's projections and norms, as a share of the schedule's."""
    clip: Positive | None = 1.0
    """Largest gradient norm; null for none."""


class ScheduleSection(Section):
    """The learning rate, a function of the tokens seen."""

    kind: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    """Cosine and linear fall from the end of the warm-up on, wsd late. inverse_sqrt continues T5's: peak /
    sqrt(max(step, offset)) with `start_step` steps behind it."""
    peak: Positive
    """Highest learning rate (inverse_sqrt: the numerator, 1.0 for T5)."""
    final_fraction: Share = 0.1
    """Learning rate at the end, as a share of the peak (cosine, linear, wsd)."""
    warmup_tokens: Count = 0
    """Linear warm-up; wins over `warmup_fraction`."""
    warmup_fraction: Share = 0.0
    """Warm-up as a share of the run."""
    decay_fraction: Share = 0.2
    """wsd: share of the run that decays at its end."""
    start_step: Count = 0
    """inverse_sqrt: steps of the pretraining (1M for T5)."""
    offset: Annotated[int, Field(ge=1)] = 10_000
    """inverse_sqrt: the first steps, during which the learning rate stood still."""


class LoraSection(Section):
    """Low-rank adapters on the attention projections, merged into the result (needs the `lora` extra)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each adapter."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale of the adapter (alpha / rank)."""


class TrainSection(Section):
    """Batches, precision, and what is trained."""

    batch_sequences: Annotated[int, Field(ge=1, le=1 << 24)]
    """Sequences a step, over all devices. The number of devices and `micro_batch` change nothing that is learnt."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Sequences of one forward pass on one device."""
    precision: Literal["bf16", "float32", "pure_bf16"] = "bf16"
    """bf16: float32 weights, bf16 arithmetic (autocast); pure_bf16: weights too."""
    parameters: Literal["all", "attention", "lora"] = "all"
    """What is trained; attention: its projections, and the norms of queries and keys where there are any."""
    lora: LoraSection = LoraSection()
    """With `parameters: lora`."""
    attention: str = "sdpa"
    """Attention implementation of transformers: sdpa, eager, flex_attention, flash_attention_2, ...; auto: flash
    attention where it is installed and runs (no dense mask between documents), else sdpa."""
    liger: bool | Literal["auto"] = False
    """Norms, rotary embeddings and gated MLPs by liger-kernel's fused kernels; auto: where it is installed, on a GPU,
    and knows the family. That logits stay as they are is tried on the model at start."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    fsdp_sync: Literal["micro_batch", "step"] = "micro_batch"
    """FSDP2: sum gradients over the processes after each micro-batch; step: once a step, which sends less and keeps
    whole float32 gradients on every device in between."""
    max_hours: Positive | None = None
    """Save and exit with 75 after so long, as a signal would have it; a later start goes on, with as long again."""
    compile: bool = False
    """torch.compile the model in place."""
    dropout: Share | None = None
    """Every dropout of the model; null: as its config.json says (T5.1.1 was pretrained with 0)."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time; slower on GPUs."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of data order, corruption, dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: leave a GPU alone."""


class GuardSection(Section):
    """When a step is not taken."""

    spike_factor: Annotated[float, Field(gt=1)] | None = 3.0
    """Skip a step whose gradient norm or loss is this many times the recent median; null for never."""
    spike_window: Annotated[int, Field(ge=4, le=1 << 20)] = 64
    """Steps that the median is taken over; no step is skipped before a quarter of it is there."""
    spike_limit: Annotated[int, Field(ge=1)] = 10
    """Stop after this many skipped steps in a row."""


class CheckpointSection(Section):
    """Saving and resuming."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Save every so many steps."""
    every_minutes: Positive | None = 30.0
    """Save when this long has passed since the last save."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Whole checkpoints kept; older ones go only after a newer one is committed."""
    resume: Literal["auto", "never"] | Place = "auto"
    """auto: from the newest whole checkpoint of `output`; never; or a checkpoint folder."""
    average: Annotated[int, Field(ge=2)] | None = None
    """Make `final` of the mean of the last so many checkpoints' weights (at most `keep` are there)."""
    asynchronous: bool = False
    """Copy weights and optimiser state into the host's memory and write them while training goes on; the first, the
    last and a best checkpoint are waited for. Costs as much host memory as a checkpoint has bytes."""
    failures_allowed: Annotated[int, Field(ge=0)] = 3
    """Saves in a row that may fail (disk full) before the run stops."""


class AveragingSection(Section):
    """An exponential average of the trained weights, beside them and in float32."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the average that an update keeps (0.999 looks back over about a thousand of them); null: no average."""
    every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between updates."""
    warmup: bool = True
    """Let the decay grow, as (1 + n) / (10 + n) over n updates, so that the weights at the start are soon forgotten."""
    final: bool = True
    """Make `final` of the average, and judge by it (best, patience, target); false: `gqa uptrain export --weights
    averaged` gets it out of a checkpoint."""


SetName = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^/\s]+$")]


class EvaluationSection(Section):
    """Held-out loss at the start, every so often, and at the end."""

    every_tokens: Count | None = None
    """Evaluate when this many more tokens were seen; null for start and end only."""
    at_tokens: tuple[Count, ...] = ()
    """And when these many were seen: a curve is best resolved where it falls fastest, near the start."""
    tokens: Count | None = 1_000_000
    """Held-out tokens to score, of each set; null for all. Of a mixture's own, shared out by weight."""
    sets: dict[SetName, Source] = Field(default_factory=dict)
    """More documents to evaluate on, by name: each has its own curve, beside the one of what is held out."""
    reference: Place | None = None
    """Folder or hub id of the original, scored once as the line to reach; default: the teacher, if there is one."""
    best: bool = False
    """Save whenever the held-out loss is the lowest so far, keep that checkpoint, and make `final` of it."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row without a lower held-out loss; the learning rate is where it was."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of lm-evaluation-harness (the `eval` extra) to score at start and end; names, or YAML files of your own."""
    tasks_every_tokens: Count | None = None
    """Score the tasks when this many more tokens were seen, too."""
    tasks_limit: Annotated[int, Field(ge=1)] | None = None
    """Examples of each task; null for all."""
    target: Positive | None = None
    """Stop as soon as an evaluation finds the held-out loss within so many nats per token of the reference's."""


class LogSection(Section):
    """What is written and shown."""

    every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between records in metrics.jsonl and the trackers."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | Literal["auto"] = "auto"
    """auto: TensorBoard where it is installed."""
    project: str = "gqa-uptrain"
    """Project name for wandb and trackio."""
    profile: bool = False
    """Trace a few early steps with torch's profiler into `<output>/profile`."""


class ExpectSection(Section):
    """What the launcher was asked for. A run that finds itself with anything else stops instead of going on slower."""

    engine: Literal["single", "ddp", "fsdp2", "deepspeed"] | None = None
    """How processes work together."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """How many there are."""


class UptrainConfig(Section):
    """An uptraining run."""

    model: Place
    """Folder of the converted model."""
    output: Place
    """Folder of the run: checkpoints, metrics, and in the end `final`, a plain transformers folder."""
    budget: BudgetSection = BudgetSection()
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    train: TrainSection
    guards: GuardSection = GuardSection()
    checkpoints: CheckpointSection = CheckpointSection()
    averaging: AveragingSection = AveragingSection()
    evaluation: EvaluationSection = EvaluationSection()
    log: LogSection = LogSection()
    expect: ExpectSection = ExpectSection()
    push: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", max_length=96)] | None = None
    """Send `final` to this repository of the hub (`owner/name`) at the end; the token is HF_TOKEN's or the one that
    `hf auth login` has left."""
    push_private: bool = True
    """Of a repository that is made for it."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along (a converted T5 does)."""

    @model_validator(mode="after")
    def _fits_together(self) -> UptrainConfig:
        problems = list(_conflicts(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def separate_documents(self) -> bool:
        """`data.separate_documents`, auto resolved."""
        return self._auto(self.data.separate_documents)

    @property
    def special_tokens(self) -> bool:
        """`data.special_tokens`, auto resolved."""
        return self._auto(self.data.special_tokens)

    @property
    def append_eos(self) -> bool:
        """`data.append_eos`, auto resolved."""
        return self._auto(self.data.append_eos)

    def _auto(self, value: bool | str) -> bool:
        return self.objective.kind == "causal_lm" if value == "auto" else bool(value)


def _conflicts(config: UptrainConfig) -> list[str]:
    problems = []
    if config.objective.kind == "span_corruption" and config.data.separate_documents is True:
        problems.append(
            "data.separate_documents: span corruption packs documents together as T5 does (its relative positions "
            "cannot restart). Set it to false or auto."
        )
    if (config.data.source is None) == (not config.data.sources):
        problems.append("data: give one `source`, or several `sources` with weights.")
    if (config.checkpoints.average or 0) > config.checkpoints.keep:
        problems.append("checkpoints.average: more checkpoints than checkpoints.keep leaves. Raise keep.")
    if config.checkpoints.average and config.evaluation.best:
        problems.append("checkpoints.average, evaluation.best: each says what `final` is made of. Choose one.")
    if config.checkpoints.average and config.averaging.decay and config.averaging.final:
        problems.append("checkpoints.average, averaging.decay: each says what `final` is made of. Choose one.")
    told = config.objective.distillation
    if told and told.cache and told.hidden_weight:
        problems.append("objective.distillation: a cache holds no hidden states. Set hidden_weight to 0, or no cache.")
    taken = {name for name, _, _ in config.data.named} & set(config.evaluation.sets)
    if taken and config.data.sources:
        problems.append(f"evaluation.sets: {', '.join(sorted(taken))} is the name of a source too. Choose another.")
    if config.objective.kind == "span_corruption" and config.data.packing == "whole":
        problems.append("data.packing=whole: span corruption packs documents together. Set it to cut or auto.")
    if config.objective.kind == "text_to_text":
        if config.data.packing == "cut":
            problems.append("data.packing=cut: texts and their answers are kept whole. Set it to whole or auto.")
        if told and told.cache:
            problems.append("objective.distillation.cache: not with text_to_text. Leave it out.")
    if config.train.batch_sequences % config.train.micro_batch:
        problems.append(
            f"train.batch_sequences={config.train.batch_sequences} is no multiple of "
            f"train.micro_batch={config.train.micro_batch}."
        )
    if "flash" in config.train.attention and config.train.precision == "float32":
        problems.append(
            f"train.attention={config.train.attention} computes in 16 bits; use train.precision bf16, or sdpa."
        )
    if config.schedule.warmup_fraction + config.schedule.decay_fraction > 1 and config.schedule.kind == "wsd":
        problems.append("schedule: warmup_fraction and decay_fraction together exceed the run.")
    if config.evaluation.target is not None and not (config.evaluation.reference or config.objective.distillation):
        problems.append("evaluation.target: there is nothing to compare with. Give evaluation.reference, or distil.")
    if config.data.held_out_fraction == 0 and config.data.held_out_source is None:
        problems.append(
            "data: nothing is held out. Give held_out_fraction or held_out_source: runs are always evaluated."
        )
    return problems
