"""A checkpoint folder as a value: read lazily, edited exactly, written as a stream, published by rename."""

from gqa_convert.checkpoint.config_json import edit_json
from gqa_convert.checkpoint.flushing import Flusher
from gqa_convert.checkpoint.reader import CONFIG, PROVENANCE, Checkpoint, Shard, read_tensor
from gqa_convert.checkpoint.safetensors_file import TensorInfo, build_header, read_header
from gqa_convert.checkpoint.staging import check_output, staged_output
from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard, write_text

__all__ = [
    "CONFIG",
    "PROVENANCE",
    "Checkpoint",
    "Flusher",
    "Shard",
    "TargetTensor",
    "TensorInfo",
    "build_header",
    "check_output",
    "edit_json",
    "read_header",
    "read_tensor",
    "staged_output",
    "write_index",
    "write_shard",
    "write_text",
]
