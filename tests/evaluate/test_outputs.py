"""What encoder-decoders write is scored as the papers' libraries score it, against references and the original's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from gqa_convert.cli.main import app
from gqa_convert.conversion.execute import convert
from gqa_convert.data.sound import at_quiet, recordings
from gqa_convert.errors import UsageError
from gqa_convert.evaluate import models
from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.suite import answering, outputs
from gqa_convert.evaluate.suite.run import SuiteSettings, with_suite
from gqa_convert.tiny.shrink import tiny_config
from tests.evaluate.tiny import LINES, write_llama, write_tokenizer
from tests.listening import save_tied_whisper, write_wave
from tests.support import Command


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "tiny-t5"
    config = tiny_config("t5", num_heads=4)
    config.vocab_size, config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 280, 0, 2, 0
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    for parameter in model.parameters():  # a new T5 writes one token over and over
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.repetition_penalty = 9.0  # which a measurement must not take over
    model.save_pretrained(folder)
    write_tokenizer(folder, sentinels=4)
    return folder


@pytest.fixture(scope="module")
def gqa_t5(t5: Path) -> Path:
    return convert(t5, groups=2, out=t5.with_name("gqa")).out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"input": line, "target": line[:30]} for line in LINES[:12]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tied_whisper(tmp_path_factory.mktemp("whisper") / "tiny-whisper", groups=2, positions=100)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings, of which two have words, one longer than a window of two seconds."""
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0)
    for name, seconds, words in (("a", 1.5, "Grey geese, flew!"), ("b", 5.0, "over the cold sea"), ("c", 1.0, None)):
        write_wave(folder / f"{name}.wav", noise.uniform(-0.5, 0.5, round(16000 * seconds)), rate=16000)
        if words is not None:
            (folder / f"{name}.txt").write_text(words)
    return folder


def test_answers_are_greedy_whatever_the_checkpoint_asks_for(t5: Path, gqa_t5: Path, pairs: Path) -> None:
    settings = EvalSettings(data=str(pairs), context=64)
    subjects = [models.subject(str(folder)) for folder in (t5, gqa_t5)]
    results = outputs.answers(subjects, settings, count=4, context=128)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    for subject in subjects:
        model = models.load(subject)
        found = next(r for r in results if (r.model, r.kind) == (subject.name, "rouge1"))
        for line, text in zip([LINES[i * 12 // 4] for i in range(4)], found.written, strict=True):
            ids, written = torch.tensor([tokenizer(line)["input_ids"]]), [0]
            while written[-1] != 2 and len(written) <= outputs.TOKENS:
                with torch.inference_mode():
                    logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written]), use_cache=False).logits
                written.append(int(logits[0, -1].argmax()))
            assert text == tokenizer.decode(written, skip_special_tokens=True).strip()[: answering.KEPT]


def test_an_original_answers_as_itself(t5: Path, gqa_t5: Path, pairs: Path) -> None:
    settings = EvalSettings(data=str(pairs), context=64)
    folders = [t5, gqa_t5]
    evaluation = with_suite(evaluate(t5, [gqa_t5], settings), folders, settings, SuiteSettings(count=6))
    by_kind = {(result.model, result.kind): result for result in evaluation.suite}
    assert by_kind["tiny-t5", "same_output"].scores == by_kind["tiny-t5", "rouge_original"].scores == (1.0,) * 6
    beside = by_kind["gqa", "rouge_original"].scores
    figures = evaluation.converted[0].figures
    assert figures["suite_rouge_original"].value == pytest.approx(sum(beside) / 6)
    rise = sum(by_kind["gqa", "rougeL"].scores) / 6 - sum(by_kind["tiny-t5", "rougeL"].scores) / 6
    assert figures["suite_rougeL_difference"].value == pytest.approx(rise)
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))).suite == evaluation.suite


def test_texts_without_references_are_set_against_the_original_alone(t5: Path, gqa_t5: Path, lines: Path) -> None:
    settings = EvalSettings(data=str(lines), context=32, max_windows=2)
    evaluation = with_suite(evaluate(t5, [gqa_t5], settings), [t5, gqa_t5], settings, SuiteSettings(count=3))
    assert {result.kind for result in evaluation.suite} == {"rouge_original", "same_output"}
    assert len(evaluation.suite[0].scores) == 3


@given(st.text("abc xyz.,-'_9\n", max_size=40), st.text("abc xyz.,-'_9\n", max_size=40))
def test_of_english_rouge_is_the_librarys_own(wanted: str, seen: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    found = {r.kind: r.scores[0] for r in outputs.rouge()("model", [seen], [wanted], [wanted])}
    theirs = RougeScorer(kinds).score(wanted, seen)
    for kind in kinds:
        assert found[kind] == (1.0 if wanted == seen else pytest.approx(theirs[kind].fmeasure))
    assert found["rouge_original"] == found["rougeL"]


def test_rouge_reads_every_script() -> None:
    found = {r.kind: r.scores for r in outputs.rouge()("m", ["кот спит", ""], ["кот ест", ""], ["кот спит", "a"])}
    assert found["rouge1"] == pytest.approx((0.5, 1.0))
    assert found["rouge_original"] == (1.0, 0.0)
    assert found["same_output"] == (1.0, 0.0)


_WORDS = st.lists(st.sampled_from(["grey", "geese", "flew", "sea"]), max_size=6)


@given(_WORDS, _WORDS)
def test_word_errors_are_the_least_that_turn_one_into_the_other(wanted: list[str], seen: list[str]) -> None:
    score = outputs.word_errors()
    said, heard = "; ".join(wanted).upper() + ".", " ".join(seen)
    (wer, cer, beside) = score("model", [heard], [said], [said])
    costs = list(range(len(seen) + 1))
    for i, word in enumerate(wanted, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(seen, 1):
            before, costs[j] = costs[j], min(before + (word != other), costs[j] + 1, costs[j - 1] + 1)
    assert (wer.scores, wer.sizes) == ((float(costs[-1]),), (max(1, len(wanted)),))
    assert beside.scores == wer.scores
    assert (cer.scores == (0.0,)) == (wanted == seen)


def test_words_are_found_beside_the_recordings(clips: Path) -> None:
    read = list(recordings(str(clips), rate=16000))
    assert [(each.name, each.words) for each in read] == [
        ("a", "Grey geese, flew!"),
        ("b", "over the cold sea"),
        ("c", None),
    ]
    assert [len(each.samples) for each in read] == [24000, 80000, 16000]
    (clips / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"c\.txt: cannot be read as UTF-8"):
        list(recordings(str(clips), rate=16000))
    (clips / "c.txt").unlink()


def test_recordings_are_cut_where_they_are_quiet() -> None:
    sound = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    sound[700:760] = 0
    pieces = at_quiet(sound, rate=100, seconds=8)
    assert sum(map(len, pieces)) == 1000
    assert 700 <= len(pieces[0]) <= 760
    assert np.array_equal(np.concatenate(pieces), sound)


def test_a_whisper_is_measured_on_its_own_transcripts(whisper: Path, clips: Path) -> None:
    made = convert(whisper, groups=2, out=whisper.with_name("gqa2")).out
    less = convert(whisper, groups=1, out=whisper.with_name("gqa1")).out
    settings = EvalSettings(data=str(clips), batch_size=2, samples=1)
    evaluation = evaluate(whisper, [made, less], settings)
    tied, merged = evaluation.converted
    assert evaluation.task == "transcripts"
    assert tied.kl == pytest.approx(0, abs=1e-5), "heads that are tied merge without loss"
    assert merged.kl > 1e-4
    assert tied.model.kv_cache_bytes_per_token * 4 == evaluation.base.kv_cache_bytes_per_token
    assert evaluation.samples[0].prompt == "(a recording)"
    # by hand, window by window
    model = AutoModelForSpeechSeq2Seq.from_pretrained(whisper).eval()
    extractor = AutoProcessor.from_pretrained(whisper).feature_extractor
    special = set(AutoTokenizer.from_pretrained(whisper).all_special_ids)
    total, tokens, windows = 0.0, 0, 0
    for each in recordings(str(clips), rate=16000):
        for piece in at_quiet(each.samples, rate=16000, seconds=1):
            sound = extractor(piece, sampling_rate=16000, return_tensors="pt")["input_features"]
            with torch.inference_mode():
                ids = model.generate(
                    sound, do_sample=False, max_new_tokens=_longest(model), force_unique_generate_call=True
                )
                logp = model(sound, decoder_input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            due = ids[0, 1:].tolist()
            first = next((i for i, t in enumerate(due) if t not in special), len(due) - 1)
            total -= sum(float(logp[i, due[i]]) for i in range(first, len(due)))
            tokens, windows = tokens + len(due) - first, windows + 1
    assert (evaluation.windows, evaluation.tokens) == (windows, tokens)
    assert evaluation.base.loss == pytest.approx(total / tokens, abs=1e-4)


def _longest(model: object) -> int:
    from gqa_convert.calibrate import heard

    return heard._longest(model.config)  # type: ignore[attr-defined]


def test_the_command_and_the_page_show_word_errors(whisper: Path, clips: Path, tmp_path: Path) -> None:
    made = convert(whisper, groups=1, out=tmp_path / "gqa1").out
    out = tmp_path / "run" / "eval.json"
    out.parent.mkdir()
    arguments = ["eval", str(whisper), str(made), "--data", str(clips), "--suite", "--suite-items", "3"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    for label in ("word errors", "character errors, change", "word errors, to the original"):
        assert label in shown.output
    evaluation = Evaluation.from_json(json.loads(out.read_text()))
    found = {(result.model, result.kind): result for result in evaluation.suite}
    wer = found["gqa1", "wer"]
    assert wer.sizes == (3, 4), "of what has no words nothing is counted"
    assert len(found["gqa1", "wer_original"].scores) == 3
    assert evaluation.converted[0].model.figures["suite_wer"].value == pytest.approx(sum(wer.scores) / 7)
    paged = CliRunner().invoke(app, ["report", str(out.parent)])
    assert paged.exit_code == 0, paged.output
    page = "".join(page.read_text() for page in out.parent.rglob("*.html"))
    assert "--suite --suite-kinds=wer --suite-items 3" in page
    assert page.index("Quality of the conversions") < page.index("word errors, change")


def test_a_conversion_of_a_whisper_is_measured_on_recordings(
    whisper: Path, clips: Path, tmp_path: Path, command: Command
) -> None:
    unmeasured = command("gqa-convert", whisper, "--groups", 1, "--out", tmp_path / "one")
    assert "not measured (it listens: name recordings with --data)" in unmeasured.out
    assert f"gqa eval {whisper} {tmp_path / 'one'} --data SOUND" in unmeasured.out
    measured = command("gqa-convert", whisper, "--groups", 1, "--data", clips, "--out", tmp_path / "two")
    assert (measured.code, measured.err) == (0, "")
    assert f"tokens of {clips.name}: " in measured.out


def test_what_does_not_go_is_refused(
    t5: Path, whisper: Path, pairs: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = write_llama(tmp_path / "llama")
    (tmp_path / "silent").mkdir()

    def refusal(*arguments: str) -> str:
        refused = CliRunner().invoke(app, ["eval", *arguments, "--max-windows", "1"])
        assert isinstance(refused.exception, UsageError), refused.output
        return str(refused.exception)

    on_pairs = (str(t5), "--data", str(pairs), "--context", "32")
    assert "copying: tiny-t5 answers or transcribes; choose from rouge" in refusal(*on_pairs, "--suite-kinds=copying")
    assert "wer: tiny-t5 answers" in refusal(*on_pairs, "--suite-kinds=wer")
    heard = refusal(str(whisper), "--data", str(clips), "--suite-kinds=rouge")
    assert "rouge: tiny-whisper answers or transcribes; choose from wer" in heard
    assert "is not a sound file by its name" in refusal(str(whisper), "--data", str(pairs))
    write_wave(tmp_path / "silent" / "none.wav", np.zeros(0), rate=16000)
    assert "holds no sound. Give a .wav file" in refusal(str(whisper), "--data", str(tmp_path / "silent"))
    lines = tmp_path / "lines.txt"
    lines.write_text(" ".join(LINES))
    assert "rouge: llama goes on with a text" in refusal(str(llama), "--data", str(lines), "--suite-kinds=rouge")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert "pip install 'gqa-convert[eval]'" in refusal(*on_pairs, "--suite")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    assert "jiwer: pip install 'gqa-convert[eval]'" in refusal(str(whisper), "--data", str(clips), "--suite")
