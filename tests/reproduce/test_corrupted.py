"""Calibration text of the T5: what its encoder met in training."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A T5's folder and a file of corrupted blocks."""
    from corrupted import corrupted_file
    from scales import SCALES
    from untrained import write_untrained

    folder = tmp_path_factory.mktemp("t5")
    scale = SCALES["tiny"]["t5"]
    write_untrained(folder, "t5", scale.small, scale, 0)
    return folder, corrupted_file(folder / "text.jsonl", folder, "stdlib", context=64, count=12)


def test_windows_of_calibration_text_are_whole_corrupted_blocks(written: tuple[Path, Path]) -> None:
    from gqa_convert.calibrate.tokens import calibration_tokens
    from gqa_convert.hf.loading import load_tokenizer

    folder, file = written
    windows = calibration_tokens(str(file), load_tokenizer(folder), sequences=12, length=64)
    assert windows.shape == (12, 64)
    config = json.loads((folder / "config.json").read_text())
    ends = windows == config["eos_token_id"]
    assert ends[:, -1].all()
    assert not ends[:, :-1].any()


def test_every_block_counts_its_sentinels_from_zero(written: tuple[Path, Path]) -> None:
    blocks = [json.loads(line)["text"] for line in written[1].read_text().splitlines()]
    for block in blocks:
        places = [block.find(f"<extra_id_{number}>") for number in range(4)]
        assert places[0] >= 0
        present = [place for place in places if place >= 0]
        assert present == sorted(present)
    assert len(set(blocks)) == len(blocks)
