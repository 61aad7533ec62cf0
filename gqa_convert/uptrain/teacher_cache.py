"""A teacher's likeliest tokens on disk, computed once over the blocks that a run trains on: for who cannot hold it.

A cache is a folder: `cache.json`, which says of which tokens, in which order and of which teacher it is, and a
safetensors file for every few hundred blocks, each written whole under its name. A killed run goes on with the files
that are missing; several processes share them out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_convert.checkpoint.fingerprint import sampled_digest
from gqa_convert.checkpoint.writer import write_text
from gqa_convert.errors import CheckpointError, OutputError, Preempted, UsageError
from gqa_convert.hf.loading import Source, load_model
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.corpus import TrainingData, prepare_data
from gqa_convert.uptrain.fused import chosen_attention
from gqa_convert.uptrain.model import ScoredModel, Teacher, check_finite, check_isolation, teacher_dtype
from gqa_convert.uptrain.objective import Head, LossSpec, TeacherOutput, TopLogits
from gqa_convert.uptrain.plan import UptrainPlan, resolve

TOP_K = 64
_META, _FORMAT = "cache.json", 1
_BLOCKS = 256
"""Blocks of a file."""
_FULL = 1 << 62
_LONGEST = 1 << 20

Tell = Callable[[str], None]


def text_identity(config: UptrainConfig, data: TrainingData) -> dict[str, Any]:
    """What decides which tokens block i of a run has."""
    digests = {name: None if store is None else store.digest for name, store in data.stores.items()}
    return {
        "tokens": digests,
        "weights": [weight for _, _, weight in config.data.named],
        "context": config.data.context,
        "window": config.data.window,
        "shuffle": config.data.shuffle,
        "packing": config.data.packing,
        "separate_documents": config.separate_documents,
        "seed": config.train.seed,
        "objective": config.objective.kind,
    }


@dataclass(frozen=True)
class CachedTeacher:
    """A cache that is there, for the blocks of a run."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, config: UptrainConfig, data: TrainingData, *, blocks: int) -> CachedTeacher:
        """Open a cache, and make sure that it is of this run's blocks.

        Raises:
            CheckpointError: if it cannot be read, or is not finished.
            UsageError: if it is of other text, or of fewer blocks or tokens than are needed.
        """
        try:
            with open(folder / _META, encoding="utf-8") as described:
                meta = json.loads(described.read(_LONGEST))
            there, identity, k = int(meta["blocks"]), meta["identity"], int(meta["top_k"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"objective.distillation.cache={folder}: holds no teacher's cache ({_short(error)}). Make one by "
                "`gqa uptrain cache-teacher`."
            ) from error
        now = json.loads(json.dumps(text_identity(config, data)))
        changed = [name for name, value in now.items() if identity.get(name) != value]
        if changed:
            raise UsageError(
                f"objective.distillation.cache={folder}: was made with other {', '.join(changed)}. Make it again with "
                "this configuration."
            )
        if there < blocks:
            raise UsageError(
                f"objective.distillation.cache={folder}: has {there:,} blocks, the run needs {blocks:,}. Go on with "
                "`gqa uptrain cache-teacher`."
            )
        wanted = config.objective.distillation
        if wanted is not None and (wanted.top_k or 0) > k:
            raise UsageError(f"objective.distillation.top_k={wanted.top_k}: the cache holds the likeliest {k} alone.")
        missing = [file for number in range(-(-blocks // _BLOCKS)) if not (file := _file(folder, number)).is_file()]
        if missing:
            raise CheckpointError(f"{missing[0]}: is missing. Go on with `gqa uptrain cache-teacher`.")
        return cls(folder, meta)

    @property
    def reference(self) -> dict[str, float]:
        """The teacher's own held-out losses."""
        return dict(self.meta["reference"])

    def __call__(self, blocks: tuple[int, ...], device: torch.device) -> TeacherOutput:
        """What the teacher says about these blocks.

        Raises:
            CheckpointError: if the cache cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        values, indices = [], []
        for block in blocks:
            number, row = divmod(block, _BLOCKS)
            path = _file(self.folder, number)
            try:
                with safe_open(path, "pt") as file:
                    values.append(file.get_slice("values")[row])
                    indices.append(file.get_slice("indices")[row])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}). Remove it, and cache again.") from error
        top = TopLogits(torch.cat(values).to(device, torch.float32), torch.cat(indices).to(device, torch.int64))
        return TeacherOutput(top.values_NK, Head(None), top=top)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]


def _file(folder: Path, number: int) -> Path:
    return folder / f"blocks-{number:06d}.safetensors"


def cache_teacher(
    config: UptrainConfig,
    out: Path,
    *,
    top_k: int = TOP_K,
    tell: Tell = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Compute a run's cache, or what is missing of it.

    Started by torchrun, the processes share the files out; they need not see each other.

    Args:
        config: the run, with a distillation section.
        out: the folder.
        top_k: tokens that are kept of each prediction.
        tell: told of long work.
        stopped: asked after every file.
        advance: told of blocks that are done.

    Returns:
        Blocks in all, and bytes of a block.

    Raises:
        UsageError: if the run does not distil, streams its text, or the folder holds another run's cache.
        Preempted: if `stopped` says so.
    """
    settings = config.objective.distillation
    if settings is None:
        raise UsageError("cache-teacher: the configuration has no objective.distillation, so no teacher.")
    if config.data.streaming:
        raise UsageError("cache-teacher: data.streaming gives text that is not known beforehand. Set it to false.")
    if config.objective.kind != "causal_lm":
        raise UsageError("cache-teacher: span corruption hides other spans in every epoch. Distil with the teacher.")
    if settings.hidden_weight:
        raise UsageError("cache-teacher: hidden states are not kept. Set objective.distillation.hidden_weight to 0.")
    plan = resolve(config.model_copy(update={"objective": _without_cache(config)}))
    assert plan.teacher is not None
    source = Source.open(plan.source, trust_remote_code=config.trust_remote_code)
    data = prepare_data(config, source.tokenizer(), source.config, tell=tell, stopped=stopped)
    total = plan.horizon.steps * config.train.batch_sequences
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.train.device != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    identity = text_identity(config, data)
    before = _described(out)
    if before is not None and (before["identity"], before["top_k"]) != (json.loads(json.dumps(identity)), top_k):
        raise UsageError(f"{out}: holds the cache of other text, or of another number of tokens. Choose another --out.")
    dtype = teacher_dtype(settings.dtype, device)
    original = Source.open(plan.teacher, trust_remote_code=config.trust_remote_code)
    attention = chosen_attention(config.train, original.model_class, device)
    model = load_model(original, dtype=dtype, attention=attention, device=device)
    check_finite(model, f"objective.distillation.teacher={settings.teacher}")
    if config.separate_documents:
        check_isolation(model)
    teacher = Teacher(model, layers=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number in range(rank, -(-total // _BLOCKS), processes):
            blocks = range(number * _BLOCKS, min(total, (number + 1) * _BLOCKS))
            if not _is_whole(_file(out, number), len(blocks)):
                if stopped():
                    raise Preempted("stopped between two files of the cache. Run the same command again to go on.")
                _write(_file(out, number), _top(teacher, data, blocks, plan, top_k, device))
            advance(len(blocks))
        if rank == 0:
            described = {
                "format": _FORMAT,
                "blocks": max(total, before["blocks"] if before else 0),
                "top_k": top_k,
                "identity": identity,
                "teacher": sampled_digest(original.checkpoint),
                "reference": _reference(model, data, config, device),
            }
            write_text(out / f"{_META}.part", json.dumps(described, indent=1) + "\n")
            os.replace(out / f"{_META}.part", out / _META)
    except OSError as error:
        raise OutputError(f"{out}: the cache cannot be written ({error.strerror or error}).") from error
    return total, config.data.context * top_k * 6


def _without_cache(config: UptrainConfig) -> Any:
    settings = config.objective.distillation
    assert settings is not None
    return config.objective.model_copy(update={"distillation": settings.model_copy(update={"cache": None})})


def _described(out: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((out / _META).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"identity", "top_k", "blocks"} <= set(found) else None
    except (OSError, ValueError):
        return None


def _is_whole(path: Path, blocks: int) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return bool(file.get_slice("values").get_shape()[0] >= blocks)
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def _top(
    teacher: Teacher, data: TrainingData, blocks: range, plan: UptrainPlan, top_k: int, device: torch.device
) -> dict[str, Tensor]:
    """The likeliest tokens at each position of these blocks: logits (B, T, K) in bf16, ids in int32."""
    from gqa_convert.uptrain.build import loss_spec

    micro, chunk = plan.config.train.micro_batch, loss_spec(plan).chunk
    values, indices = [], []
    for first in range(blocks.start, blocks.stop, micro):
        part = range(first, min(blocks.stop, first + micro))
        batch = data.collate([(i, data.blocks.get(i), _FULL) for i in part]).to(device)
        said = teacher(batch.inputs)
        top = [
            said.head.logits(said.hidden_ND[start : start + chunk]).topk(min(top_k, teacher.vocabulary), dim=-1)
            for start in range(0, len(said.hidden_ND), chunk)
        ]
        shape = (len(part), -1, top[0].values.shape[-1])
        values.append(torch.cat([piece.values for piece in top]).to("cpu", torch.bfloat16).view(shape))
        indices.append(torch.cat([piece.indices for piece in top]).to("cpu", torch.int32).view(shape))
    return {"values": torch.cat(values), "indices": torch.cat(indices)}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}.part-{os.getpid()}")
    save_file(tensors, beside)
    os.chmod(beside, 0o666 & ~_umask())
    os.replace(beside, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@torch.no_grad()
def _reference(model: Any, data: TrainingData, config: UptrainConfig, device: torch.device) -> dict[str, float]:
    """The teacher's held-out losses, as `gqa_convert.uptrain.evaluation.evaluate` names them."""
    from gqa_convert.data.batches import evaluation_batches

    scored = ScoredModel(model, LossSpec()).eval()
    found: dict[str, float] = {}
    main = [0.0, 0.0]
    for held in data.sets:
        sums = [0.0, 0.0]
        for batch in evaluation_batches(
            held.blocks, data.collate_held_out, micro=config.train.micro_batch, processes=1, rank=0
        ):
            moved = batch.to(device)
            sums[0] += float(scored(moved.inputs, moved.labels)[1][0])
            sums[1] += batch.valid
        main = [a + b * held.main for a, b in zip(main, sums, strict=True)]
        if len(data.sets) > 1 and held.name:
            found[f"loss/{held.name}"] = sums[0] / max(1.0, sums[1])
    return {"loss": main[0] / max(1.0, main[1])} | found
