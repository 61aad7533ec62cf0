from pathlib import Path

import pytest

from gqa_convert.conversion.execute import convert
from tests.evaluate.tiny import write_lines, write_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def llama_gqa2(llama: Path) -> Path:
    return convert(llama, groups=2, out=llama.with_name("tiny-llama-gqa2")).out


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "lines.jsonl")
