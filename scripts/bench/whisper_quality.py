#!/usr/bin/env python3
"""Show what converting a Whisper costs: word error on recordings, and loss on the original's own transcripts.

    python scripts/bench/whisper_quality.py WHISPER --clips CLIPS --calibration SOUND --groups 3,2 --out RESULT.json

CLIPS is a folder of .wav files, each with its words in a .txt of the same name (case and punctuation do not count).
Recordings longer than 28 seconds are cut where they are quietest. Loss is teacher-forced: every model reads the
original's greedy transcript of each piece, and scores it token by token, its end included. SOUND calibrates `fast` and
`best`; it should be other recordings than CLIPS. The figures are written as they come, and an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import processor

if TYPE_CHECKING:
    from torch import Tensor

ROWS: dict[str, dict[str, Any]] = {"mean": {}, "fast": {"preset": "fast"}, "best": {"preset": "best"}}
"""Row -> what is chosen about the merge; presets get the calibration sound."""
RATE, LONGEST = 16000, 28  # samples a second; seconds of a piece, where a recording is cut


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording: `features` (1, bins, frames) and the original's transcript, ids (1, T)."""

    clip: str
    features: Tensor
    transcript: Tensor


def main() -> None:
    """Run everything and print it."""
    args = parse_arguments()
    original = load(args.model)
    pieces = heard(args, original)
    words = {file.stem: file.read_text() for file in sorted(args.clips.glob("*.txt"))}
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    result.setdefault("rows", {})
    if "original" not in result:
        result["original"] = point(args, original, pieces, words)
    show("original", "", result["original"])
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        for name in args.rows or ROWS:
            for groups in args.groups:
                row = result["rows"].setdefault(name, {})
                if str(groups) not in row:
                    started = time.perf_counter()
                    out = convert_one(args, name, groups, work)
                    seconds = round(time.perf_counter() - started, 1)
                    row[str(groups)] = {"seconds": seconds, **point(args, load(out), pieces, words)}
                show(name, groups, row[str(groups)])
                if args.out:
                    args.out.write_text(json.dumps(described(args, pieces, words, result), indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=Path, required=True, help="folder of .wav files with their words in .txt")
    parser.add_argument("--calibration", required=True, help="as for --calibrate: a file, a folder, a hub dataset")
    parser.add_argument("--groups", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--rows", type=lambda text: text.split(","), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--calibration-sequences", type=int, help="as for gqa-convert")
    parser.add_argument("--refit-steps", type=int, help="as for gqa-convert: steps of `best` per attention block")
    parser.add_argument("--refit-tokens", type=int, help="as for gqa-convert: tokens of each step")
    parser.add_argument("--work", type=Path, help="keep transcripts, moments and models here, for the next call")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def load(folder: Path) -> Any:
    """Load a model as any user of the package does, in float32."""
    import torch
    import transformers

    import gqa_convert  # noqa: F401  (tells the Auto classes about converted models)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).eval()


def heard(args: argparse.Namespace, original: Any) -> list[Piece]:
    """Cut every clip into pieces and let the original transcribe them."""
    import torch
    from transformers import AutoFeatureExtractor

    from gqa_convert.data.sound import at_quiet, recordings

    extractor = AutoFeatureExtractor.from_pretrained(args.model)
    pieces = []
    for recording in recordings(str(args.clips), rate=RATE):
        for stretch in at_quiet(recording.samples, rate=RATE, seconds=LONGEST):
            features = extractor(stretch, sampling_rate=RATE, return_tensors="pt")["input_features"]
            with torch.no_grad():
                ids = original.generate(features, do_sample=False, force_unique_generate_call=True)
            pieces.append(Piece(clip=recording.name, features=features, transcript=ids))
    return pieces


def convert_one(args: argparse.Namespace, name: str, groups: int, work: Path) -> Path:
    """Convert by one row; transcripts and moments are made once for all."""
    from gqa_convert import convert
    from gqa_convert.conversion.recipe import make_recipe

    chosen = dict(ROWS[name])
    if chosen:
        chosen |= {"calibrate": args.calibration, "sequences": args.calibration_sequences}
    if name == "best":
        chosen |= {"refit_steps": args.refit_steps, "refit_tokens": args.refit_tokens}
    recipe = make_recipe(chosen.pop("preset", None), **chosen)
    out = work / f"{name}-{groups}"
    convert(args.model, groups=groups, out=out, recipe=recipe, work=work / "w", force=True)
    return out


def point(args: argparse.Namespace, model: Any, pieces: list[Piece], words: dict[str, str]) -> dict[str, Any]:
    """Word errors of each clip, loss on the original's transcripts in nats per token, and what it wrote."""
    from transformers import AutoTokenizer

    from gqa_convert.evaluate.suite.outputs import word_errors

    score = word_errors()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    wrote: dict[str, str] = {}
    losses: list[Tensor] = []
    for piece in pieces:
        ids = model.generate(piece.features, do_sample=False, max_new_tokens=200)
        said = str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()
        wrote[piece.clip] = f"{wrote.get(piece.clip, '')} {said}".strip()
        losses.append(token_losses(model, piece))
    clips = {}
    for clip, text in wrote.items():
        found = score(clip, [text], [words[clip]], [text])[0]
        clips[clip] = {"word_errors": int(found.scores[0]), "words": found.sizes[0], "text": text}
    every = [float(loss) for piece in losses for loss in piece]
    return {"loss": sum(every) / len(every), "tokens": len(every), "clips": clips}


def token_losses(model: Any, piece: Piece) -> Tensor:
    """Nats of each token of the original's transcript, (T - 1,), but for what stands before its first word."""
    import torch

    read, due = piece.transcript[:, :-1], piece.transcript[0, 1:]
    with torch.no_grad():
        logits = model(piece.features, decoder_input_ids=read, use_cache=False).logits[0]
    losses: Tensor = -logits.log_softmax(-1).gather(1, due[:, None])[:, 0]
    return losses[due != model.generation_config.no_timestamps_token_id]


def show(name: str, groups: int | str, seen: dict[str, Any]) -> None:
    """Print one line."""
    clips = "  ".join(f"{clip} {found['word_errors']}/{found['words']}" for clip, found in seen["clips"].items())
    print(f"{name:10s} {groups!s:3s} loss {seen['loss']:.3f} nats per token  wrong words: {clips}", flush=True)


def described(
    args: argparse.Namespace, pieces: list[Piece], words: dict[str, str], result: dict[str, Any]
) -> dict[str, Any]:
    """The figures with what they were made of; names only, no paths."""
    return {
        "model": args.model.name,
        "clips": {clip: len(said.split()) for clip, said in words.items()},
        "pieces": len(pieces),
        "calibration": Path(args.calibration).name,
        "machine": {"processor": processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
        "command": command(args),
        "original": result["original"],
        "rows": result["rows"],
    }


def command(args: argparse.Namespace) -> str:
    """The call that makes these figures anew."""
    words = ["python scripts/bench/whisper_quality.py MODEL --clips CLIPS --calibration SOUND --groups"]
    words.append(",".join(map(str, args.groups)))
    for name in ("calibration_sequences", "refit_steps", "refit_tokens"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return " ".join(words)


if __name__ == "__main__":
    main()
