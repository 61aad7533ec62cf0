"""llama.cpp through cyllama, from the official converter (or a .gguf file that lies in the folder).

The converter is in no wheel: it is looked for in $LLAMA_CPP_DIR, then in `llama.cpp` beside the engine's environment.
Token ids go in and none is spelled, so the vocabulary is made up; a converter knows only some tokenizers.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import cyllama.llama.llama_cpp as llama

CACHE = "read from the engine: llama_state_seq_get_size, which counts a few bytes of position per token too"
TYPES = {"float32": ("f32", 0), "float16": ("f16", 1), "bfloat16": ("bf16", 30)}  # converter's word, ggml_type
BATCH = 512  # tokens that are read at a time, llama.cpp's own default


def version() -> str:
    """Engine and version."""
    return f"llama.cpp (cyllama {installed('cyllama')})"


class Model:
    """A model and the context that it decodes in."""

    def __init__(self, folder: str, work: str, dtype: str, threads: int, batch: int, tokens: int) -> None:
        name = "float16" if dtype == "auto" else dtype
        word, self._type = TYPES[name]
        ready = sorted(Path(folder).glob("*.gguf"))
        file = str(ready[0]) if ready else _converted(folder, f"{work}/model-{word}.gguf", word)
        llama.llama_backend_init()
        self._model = _Named(path_model=file, verbose=False)
        self._threads = threads
        self._context: Any = None
        self._known = 0, b""  # tokens of the longest prompt that was read, and its keys and values
        weights = {"dtype": "as in the .gguf file" if ready else name, "weight_bytes": int(self._model.size)}
        self.facts = weights | {"cache_dtype": name}

    def _open(self, batch: int, room: int) -> Any:
        parameters = llama.LlamaContextParams()
        parameters.n_ctx = batch * (-(-room // 256) * 256)
        parameters.n_seq_max, parameters.kv_unified = batch, False
        parameters.n_batch = parameters.n_ubatch = max(BATCH, batch)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = self._type
        return llama.LlamaContext(model=self._model, params=parameters, verbose=False)

    def _read(self, context: Any, sequence: int, length: int, first: int = 0) -> None:
        size = int(self._model.n_vocab)
        for start in range(first, length, BATCH):
            part = min(BATCH, length - start)
            batch = llama.LlamaBatch(n_tokens=part, embd=0, n_seq_max=1)
            for place in range(start, start + part):
                batch.add(3 + place * 7919 % (size - 3), place, [sequence], place == length - 1)
            context.decode(batch)
        context.synchronize()

    def prefill(self, batch: int, context: int) -> float:
        """Seconds to read prompts, one sequence after the other, 512 tokens at a time."""
        opened = self._open(batch, context)
        started = time.perf_counter()
        for sequence in range(batch):
            self._read(opened, sequence, context)
        seconds = time.perf_counter() - started
        opened.close()
        return seconds

    def fill(self, batch: int, context: int, room: int) -> None:
        """Read a prompt, and give its keys and values to the other sequences.

        The longest that was read is kept: prompts of one model begin alike, and reading thousands of tokens anew for
        every batch would take longer than all that is timed.
        """
        self.drop()
        self._context = self._open(batch, context + room)
        self._length, self._batch = context, batch
        length = self._remember()
        if length < context:
            self._read(self._context, 0, context, length)
            self._known = context, _one_stream(bytes(self._context.get_state_seq_data(0)), batch)
        for sequence in range(1, batch):
            self._context.memory_seq_cp(0, sequence, -1, -1)

    def _remember(self) -> int:
        """Put what was read before into the first sequence; how many tokens that were."""
        length, state = self._known
        if not 0 < length <= self._length:
            return 0
        try:
            self._context.set_state_seq_data(_streams(state, self._batch), 0)
        except ValueError:
            length = 0
        if length and int(self._context.memory_seq_pos_max(0)) == length - 1:
            return length
        self._context.memory_seq_rm(0, -1, -1)
        return 0

    def cache_bytes(self) -> int:
        """Bytes of all sequences."""
        return sum(int(self._context.get_state_seq_size(sequence)) for sequence in range(self._batch))

    def steps(self, count: int) -> float:
        """Decode and forget it again."""
        context: Any = self._context
        started = time.perf_counter()
        for step in range(count):
            batch = llama.LlamaBatch(n_tokens=self._batch, embd=0, n_seq_max=1)
            for sequence in range(self._batch):
                batch.add(3, self._length + step, [sequence], True)
            context.decode(batch)
            context.synchronize()
        seconds = time.perf_counter() - started
        for sequence in range(self._batch):
            context.memory_seq_rm(sequence, self._length, -1)
        return seconds

    def drop(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
        self._context = None


def _streams(state: bytes, count: int) -> bytes:
    """The first sequence's state as a cache for so many writes it: their number, its cells, and 0 cells of the others.

    A magic number and the sequence's own stand in front. What is written otherwise is refused, and the prompt read.
    """
    return state[:8] + count.to_bytes(4, "little") + state[12:] + bytes(4 * (count - 1))


def _one_stream(state: bytes, count: int) -> bytes:
    """Undo `_streams`."""
    return state[:8] + (1).to_bytes(4, "little") + state[12 : len(state) - 4 * (count - 1)]


class _Named(llama.LlamaModel):  # type: ignore[misc]
    """cyllama's own, with the attribute that its contexts ask for."""

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.get_vocab().n_vocab)


def _converted(folder: str, file: str, word: str) -> str:
    places = [Path(os.environ.get("LLAMA_CPP_DIR", "/nowhere")), Path(sys.prefix).parent / "llama.cpp"]
    found = next((place for place in places if (place / "convert_hf_to_gguf.py").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            "convert_hf_to_gguf.py is not there: name llama.cpp's folder by LLAMA_CPP_DIR, or put a .gguf file into "
            "the model's folder"
        )
    sys.path[:0] = [str(found), str(found / "gguf-py")]
    from conversion import load_all_models
    from conversion.base import TextModel

    load_all_models()
    for cls in _subclasses(TextModel):
        if "set_vocab" in vars(cls):
            cls.set_vocab = _set_vocab
    sys.argv = ["convert_hf_to_gguf.py", "--outtype", word, "--outfile", file, folder]
    runpy.run_path(str(found / "convert_hf_to_gguf.py"), run_name="__main__")
    return file


def _subclasses(cls: type) -> set[Any]:
    below: list[type] = cls.__subclasses__()
    return {cls}.union(*(_subclasses(each) for each in below))


def _set_vocab(self: Any) -> None:
    """Pieces of a sentencepiece model, one a token id."""
    size = int(self.hparams["vocab_size"])
    special = {0: (b"<unk>", 2), 1: (b"<s>", 3), 2: (b"</s>", 3)}
    pieces = [special.get(number, (f"<piece{number}>".encode(), 1)) for number in range(size)]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list([piece for piece, _ in pieces])
    self.gguf_writer.add_token_scores([0.0] * size)
    self.gguf_writer.add_token_types([kind for _, kind in pieces])
    self.gguf_writer.add_vocab_size(size)
