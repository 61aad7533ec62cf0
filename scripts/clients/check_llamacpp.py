"""Engine check: llama.cpp through cyllama, from the official converter, in float32, cache included; and in Q4_K_M.

The converter comes from llama-cpp-python's source archive, which setup.sh unpacks beside the environment. It looks the
tokenizer up by a hash of its output and knows none that was made here, so it is given one: everything else is as it is
for a user. Flash attention is off: llama.cpp computes it in half precision on a CPU.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cyllama.llama.llama_cpp as llama
import numpy as np
from common import compare, log_softmax, main

CONVERTER = Path(sys.prefix).parent / "llama.cpp"
sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]

import gguf  # noqa: E402  (the converter's own)
from conversion import load_all_models  # noqa: E402
from conversion.base import TextModel  # noqa: E402

F32, FLASH_OFF, Q4_K_M = 0, 0, 15  # ggml_type, llama_flash_attn_type, llama_ftype


class Model(llama.LlamaModel):  # type: ignore[misc]
    """cyllama's own, with the attribute that its contexts ask for."""

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.get_vocab().n_vocab)


KV_COUNT = "phi2.attention.head_count_kv"


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Logits of every position; what the cache holds per token; how far Q4_K_M is off."""
    with tempfile.TemporaryDirectory() as out:
        file = f"{out}/model.gguf"
        _convert(folder, file)
        try:
            return _run(file, out, folder, ids)
        except Exception as error:
            said = " ".join(str(error).split())
            if not _set_kv_count(folder, file):
                raise
            return _refused_at_first(*_run(file, out, folder, ids), said, folder)


def _run(file: str, out: str, folder: Path, ids: list[int]) -> tuple[Any, dict[str, Any]]:
    logits, cache_bytes = _logits(file, ids)
    parameters = llama.LlamaModelQuantizeParams()
    parameters.ftype, parameters.nthread = Q4_K_M, 1
    small = f"{out}/small.gguf"
    llama.model_quantize(file, small, parameters)
    reference = log_softmax(np.load(folder / "reference.npz")["logits"])
    quantised = compare(log_softmax(_logits(small, ids)[0]), reference)["difference"]
    return logits, {"cache_bytes_per_token": cache_bytes, "q4_k_m_difference": quantised}


def _refused_at_first(logits: Any, more: dict[str, Any], said: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The folder as it is was refused: no values, but what came once the GGUF was told its number of KV heads."""
    reference = log_softmax(np.load(folder / "reference.npz")["logits"])
    mended = compare(log_softmax(logits), reference) | more
    return logits, {"error": said[:300], "mended": mended | {"by": f"gguf-set-metadata MODEL.gguf {KV_COUNT} N"}}


def _convert(folder: Path, file: str) -> None:
    for cls in _subclasses(TextModel):
        if "set_vocab" in vars(cls):
            cls.set_vocab = _set_vocab
    sys.argv = ["convert_hf_to_gguf.py", "--outtype", "f32", "--outfile", file, str(folder)]
    runpy.run_path(str(CONVERTER / "convert_hf_to_gguf.py"), run_name="__main__")


def _subclasses(cls: type) -> set[Any]:
    below: list[type] = cls.__subclasses__()
    return {cls}.union(*(_subclasses(each) for each in below))


def _set_vocab(self: Any) -> None:
    """Pieces of a sentencepiece model, one a token id."""
    size = int(self.hparams["vocab_size"])
    special = {0: (b"<unk>", 2), 1: (b"<s>", 3), 2: (b"</s>", 3)}
    pieces = [special.get(i, (f"<piece{i}>".encode(), 1)) for i in range(size)]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list([piece for piece, _ in pieces])
    self.gguf_writer.add_token_scores([0.0] * size)
    self.gguf_writer.add_token_types([kind for _, kind in pieces])
    self.gguf_writer.add_vocab_size(size)


def _set_kv_count(folder: Path, file: str) -> bool:
    """Write the number of KV heads that the converter leaves out for Phi into the GGUF; False for other families."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "phi":
        return False
    field = gguf.GGUFReader(file, "r+").get_field(KV_COUNT)
    field.parts[field.data[0]][0] = config["num_key_value_heads"]
    return True


def _logits(file: str, ids: list[int]) -> tuple[Any, float]:
    """Logits of every position, and the bytes by which a token lets the state of a sequence grow."""
    model = Model(path_model=file, verbose=False)
    parameters = llama.LlamaContextParams()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 256, 64, 64
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = F32
    parameters.flash_attn_type = FLASH_OFF
    context = llama.LlamaContext(model=model, params=parameters, verbose=False)
    rows, sizes = [], []
    half = len(ids) // 2
    for start, part in ((0, ids[:half]), (half, ids[half:])):
        batch = llama.LlamaBatch(n_tokens=len(part), embd=0, n_seq_max=1)
        for offset, token in enumerate(part):
            batch.add(token, start + offset, [0], True)
        context.decode(batch)
        rows += [np.array(context.get_logits_ith(i)) for i in range(len(part))]
        sizes.append(context.get_state_seq_size(0))
    return np.stack(rows), (sizes[1] - sizes[0]) / (len(ids) - half)


if __name__ == "__main__":
    load_all_models()
    llama.llama_backend_init()
    main(logits_of, lambda: f"llama.cpp b9190 (cyllama {version('cyllama')})")
