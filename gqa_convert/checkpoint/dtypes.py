"""Number formats: what safetensors calls them, how many bits they take, and the torch dtype they are.

Also the two ways across the border between tensors and bytes. Neither converts a number, so every dtype survives.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_convert.checkpoint.files import open_regular
from gqa_convert.errors import CheckpointError, check_choice

if TYPE_CHECKING:
    import torch

BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, for every format that safetensors 0.8 knows. A format missing here can still be copied."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Formats that heads can be merged in."""

_TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}

FLOAT_NAMES: dict[str, str] = {
    "float32": "F32",
    "fp32": "F32",
    "f32": "F32",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float16": "F16",
    "fp16": "F16",
    "f16": "F16",
    "half": "F16",
}
"""What users call the formats that models run in, and what safetensors calls them."""


def named_float(name: str) -> torch.dtype:
    """Return the dtype that a user named, in one of the spellings of `FLOAT_NAMES`.

    Raises:
        UsageError: if it is none of them.
    """
    if name.lower() not in FLOAT_NAMES:
        check_choice("--dtype", name, ["auto", *FLOAT_NAMES])
    return torch_dtype(FLOAT_NAMES[name.lower()])


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name such as `"BF16"`.

    Raises:
        CheckpointError: if torch has no element of that kind (sub-byte formats, formats newer than this table).
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"dtype {name!r} has no torch equivalent here: such tensors can be copied but not computed with."
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype, e.g. `"BF16"` of `torch.bfloat16`.

    Raises:
        CheckpointError: if safetensors cannot hold that dtype.
    """
    import torch

    for name, attribute in _TORCH_NAMES.items():
        if getattr(torch, attribute, None) is dtype:
            return name
    raise CheckpointError(f"{dtype} cannot be stored in a safetensors file. Cast the tensor to a float dtype first.")


def not_finite(tensor: torch.Tensor) -> int:
    """How many values of a tensor are NaN or infinite.

    A sum is not finite if any element is not; it may also overflow, so only then is every element looked at. A sum in
    the tensor's own dtype is the fastest: torch accumulates half precision in float32 all the same.
    """
    return 0 if bool(tensor.sum().isfinite()) else int((~tensor.isfinite()).sum())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View a tensor's elements as bytes, in row-major order, little-endian; no copy if it is contiguous on the CPU."""
    import torch

    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little-endian; this machine is not")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_bytes(file: Path, offset: int, nbytes: int) -> torch.Tensor:
    """Read part of a file into new memory: a uint8 tensor of shape `(nbytes,)`.

    Raises:
        CheckpointError: if the file cannot be read or ends before that.
    """
    import torch

    data = torch.empty(nbytes, dtype=torch.uint8)
    view, done = data.numpy().data, 0
    try:
        with open_regular(file) as stream:
            stream.seek(offset)
            while done < nbytes:
                got = stream.readinto(view[done:])  # type: ignore[attr-defined]
                if not got:
                    raise CheckpointError(
                        f"{file}: ends {nbytes - done:,} bytes early: it changed while it was being read."
                    )
                done += got
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    return data


def from_bytes(data: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """View the bytes in a uint8 tensor as a tensor of a safetensors dtype; no copy.

    Raises:
        CheckpointError: if torch has no such dtype.
    """
    return data.view(torch_dtype(dtype)).reshape(shape)
