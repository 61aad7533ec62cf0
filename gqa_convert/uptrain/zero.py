"""DeepSpeed's ZeRO stage 3, through accelerate: parameters, gradients and optimiser state spread over processes.

DeepSpeed takes its settings as one dictionary; what the run's configuration decides is written into it here, and what
would contradict that is refused. The rest is what differs from other engines: the norm of gradients of which each
process holds a part, checkpoints, and making weights whole again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqa_convert.errors import CheckpointError, UsageError
from gqa_convert.uptrain.config import UptrainConfig
from gqa_convert.uptrain.optim import get_optimizer

FOLDER = "deepspeed"
"""Where a training checkpoint holds DeepSpeed's own files."""
_TAG = "zero3"


def is_zero(model: Any) -> bool:
    """Whether a model is in DeepSpeed's hands."""
    return hasattr(model, "zero_optimization_stage")


def zero_plugin(config: UptrainConfig) -> Any | None:
    """DeepSpeed's settings if the launcher asked for DeepSpeed, else None.

    Raises:
        UsageError: if it is not installed, or the run asks for what it cannot do.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UsageError("engine deepspeed needs DeepSpeed: pip install 'gqa-convert[deepspeed]'.") from error
    from accelerate import DeepSpeedPlugin

    # Spread by DeepSpeed as transformers loads it, the model could not be tried out before training.
    plugin = DeepSpeedPlugin(zero3_init_flag=False)
    settings = plugin.deepspeed_config
    problems = [*_conflicts(config), *_unfit(settings)]
    if problems:
        raise UsageError("engine deepspeed: " + "; ".join(problems) + ".")
    settings |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        # Steps are counted here, not there: every micro-batch says whether it is the last of its step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip or 0.0,
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
    }
    return plugin


def _conflicts(config: UptrainConfig) -> Iterator[str]:
    train = config.train
    if "LOCAL_RANK" not in os.environ:
        yield "start its processes with a launcher (scripts/launch/many_gpus.sh)"
    if train.device == "cpu":
        yield "train.device=cpu makes accelerate leave DeepSpeed out; use auto"
    if get_optimizer(config.optimizer.kind).whole_matrices:
        yield f"optimizer.kind={config.optimizer.kind} needs whole matrices, and ZeRO-3 cuts them up; use adamw"
    if train.parameters == "lora":
        yield "train.parameters=lora: adapters are small; use DDP for them"
    if train.precision == "pure_bf16":
        yield "train.precision=pure_bf16: use bf16 (float32 weights are spread over the processes)"
    if config.checkpoints.asynchronous:
        yield "checkpoints.asynchronous: DeepSpeed writes its own files; set it to false"
    if config.averaging.decay is not None:
        yield "averaging.decay: DeepSpeed's weights cannot be averaged here; use FSDP2 or DDP"
    if train.compile:
        yield "train.compile does not see weights that come and go; set it to false"


def _unfit(settings: dict[str, Any]) -> Iterator[str]:
    """What accelerate's or a DeepSpeed configuration file holds that does not go together with a run."""
    stage = settings.get("zero_optimization", {})
    if stage.get("stage") != 3:
        yield f"ZeRO stage {stage.get('stage')} is not supported; use stage 3, or DDP"
    for what in ("offload_optimizer", "offload_param"):
        if (stage.get(what) or {}).get("device", "none") not in ("none", None):
            yield f"{what} is not supported; set it to none"
    for section in ("fp16", "bf16"):
        if settings.get(section, {}).get("enabled") is True:
            yield f"train.precision decides the precision; take {section} out of DeepSpeed's configuration"
    for section in ("optimizer", "scheduler"):
        if section in settings:
            yield f"the run's {section} is used; take {section} out of DeepSpeed's configuration"


def leave_loading_alone() -> None:
    """Keep transformers from cutting up every model it loads, the teacher's and the reference's too."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def announce_head(scored: Any) -> None:
    """Tell DeepSpeed that a `ScoredModel` reads the output matrix itself, outside of the layer that owns it."""
    if not scored.skips_head:
        return
    import deepspeed

    layer = scored.model.get_output_embeddings()
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            deepspeed.zero.register_external_parameter(scored, parameter)


def gradient_norm(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of the averaged gradient, of which each process holds a part; the same on every process."""
    from deepspeed.utils import safe_get_local_grad

    squares = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        squares += safe_get_local_grad(parameter).double().square().sum()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


def save_zero(folder: Path, model: Any) -> None:
    """Write every process's part of trained parameters and optimiser state. Called by every process."""
    model.save_checkpoint(str(folder / FOLDER), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)


def load_zero(folder: Path, model: Any) -> None:
    """Read what `save_zero` wrote. Called by every process, before the first step.

    Raises:
        CheckpointError: if the checkpoint is of another number of processes, or does not fit.
    """
    saved = len(list((folder / FOLDER / _TAG).glob("*_optim_states.pt")))
    processes = torch.distributed.get_world_size()
    if saved != processes:
        raise CheckpointError(f"{folder}: saved by {saved} DeepSpeed processes; resume with as many, not {processes}.")
    with _tensors_only():
        loaded, _ = model.load_checkpoint(str(folder / FOLDER), tag=_TAG, load_module_strict=False)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed cannot read its files. Resume from another checkpoint.")


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The trained parameters of a training checkpoint in float32, joined from what every process wrote.

    Raises:
        UsageError: if DeepSpeed is not installed.
        CheckpointError: if its files cannot be read.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UsageError(f"{folder}: reading it needs DeepSpeed: pip install 'gqa-convert[deepspeed]'.") from error
    try:
        with _tensors_only(), redirect_stdout(sys.stderr):
            weights = get_fp32_state_dict_from_zero_checkpoint(
                str(folder / FOLDER), tag=_TAG, exclude_frozen_parameters=True
            )
    except Exception as error:  # of a damaged file, whatever its parts come to
        words = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: DeepSpeed cannot read its files ({words}).") from error
    return dict(weights)


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let DeepSpeed's `torch.load` make tensors, plain values and its own two kinds of settings, and nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def gather_zero(model: Any) -> dict[str, Tensor]:
    """The whole state dict on the CPU of the main process, a tensor at a time; empty on the others."""
    import deepspeed

    main = torch.distributed.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, value in model.module.state_dict(keep_vars=True).items():
        cut = [value] if hasattr(value, "ds_id") else []
        with deepspeed.zero.GatheredParameters(cut):
            if main:
                weights[name] = value.detach().cpu().clone()
    return weights
