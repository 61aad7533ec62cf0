"""One process of a DeepSpeed run that skips a step and stops after another: `skip=6 stop=10 CONFIG`, counted from 1."""

import sys
from pathlib import Path
from typing import Any

from gqa_convert.errors import Preempted
from gqa_convert.uptrain import loop
from gqa_convert.uptrain.guards import Guards
from gqa_convert.uptrain.read_config import load_config


def skip_step(number: int) -> None:
    guards: Any = Guards
    real = guards.accepts

    def accepts(self: Guards, *, step: int, loss: float, norm: float) -> bool:
        return real(self, step=step, loss=loss, norm=norm) and step != number

    guards.accepts = accepts


def stop_after(number: int) -> None:
    patched: Any = loop
    real = patched.train_step

    def train_step(parts: Any, guards: Any, at: int, *, stop: bool, save: bool) -> Any:
        return real(parts, guards, at, stop=stop or at + 1 == number, save=save)

    patched.train_step = train_step


def main(skip: str, stop: str, config: str) -> None:
    skip_step(int(skip.removeprefix("skip=")))
    stop_after(int(stop.removeprefix("stop=")))
    try:
        loop.uptrain(load_config(Path(config)))
    except Preempted as error:
        sys.stdout.write(f"{error}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
