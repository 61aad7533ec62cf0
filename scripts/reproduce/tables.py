"""RESULTS.md: every table and every sentence is written from results.json's figures."""

from __future__ import annotations

from functools import partial
from typing import Any

import words
from findings import CONTROL, FIGURE_4, FIGURE_5, Findings, Saving

TITLES = {"decoder": "Decoder (Llama-shaped)", "t5": "Encoder-decoder (T5.1.1-shaped)"}
_SHOWN = (0.0, 0.01, 0.02, 0.05, 0.1)
_SPANS = (
    " The objective is T5's span corruption (15 % of the tokens, spans of 3); tokens are those that the encoder reads, "
    "and the loss is that of the spans. Layers are the encoder's and the decoder's. Self- and cross-attention of the "
    "decoder are converted, as in the paper, the encoder is not. Calibration texts have spans cut out as in training."
)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def family(name: str, findings: Findings, scale: dict[str, Any], speed: dict[str, Any]) -> str:
    """Everything about one family."""
    parts = [
        f"## {TITLES[name]}",
        setup(name, findings, scale),
        f"### Figure 4: how heads are merged\n\n![Figure 4](figures/{name}-figure-4.png)",
        figure_4(findings),
        words.order_of_figure_4(findings),
        f"### Figure 5: how long is uptrained\n\n![Figure 5](figures/{name}-figure-5.png)",
        curves_table(findings, FIGURE_5),
        "\n".join(f"- {line}" for line in words.shape_of_figure_5(findings)),
        "### Table 1: quality and time",
        table_1(name, findings, speed),
        f"### A better start\n\n![A better start](figures/{name}-starts.png)",
        ours(findings),
        savings(findings),
        words.left_out(findings),
    ]
    return "\n\n".join(part for part in parts if part)


def setup(name: str, findings: Findings, scale: dict[str, Any]) -> str:
    """What was trained, on how much, and how well."""
    first = next(iter(findings.found.values()))["pretraining"]
    rows = []
    for size in reversed(findings.sizes()):
        shape = scale[size]
        rows.append(
            [
                size,
                f"{shape['layers']} + {shape['layers']}" if name == "t5" else str(shape["layers"]),
                str(shape["width"]),
                str(shape["heads"]),
                f"{first[size]['parameters']:,}",
                words.nats(findings.pretrained(size)),
            ]
        )
    shown = table(["model", "layers", "width", "heads", "parameters", "held-out loss, nats per token"], rows)
    return (
        f"{shown}\n\nPretraining: {scale['steps']:,} steps of {scale['batch']} x {scale['context']} tokens = "
        f"{findings.total:,} tokens; seeds {', '.join(map(str, findings.found))}; alpha 0.05 is "
        f"{round(0.05 * findings.total):,} tokens. ± is half the 95 % t interval over seeds; of "
        "differences, it is taken of the differences seed by seed." + (_SPANS if name == "t5" else "")
    )


def figure_4(findings: Findings) -> str:
    """Loss at alpha 0 and 0.05 by merge."""
    rows = [
        [arm.split("-")[0], *[f"{findings.loss(arm, alpha).mean:.3f}" for alpha in (0.0, 0.05)],
         words.nats(findings.gap(arm, 0.05), sign=True)]
        for arm in (*FIGURE_4, CONTROL)
    ]  # fmt: skip
    return table(["MQA from", "loss at alpha 0", "at 0.05", "above the control"], rows)


def curves_table(findings: Findings, arms: tuple[str, ...]) -> str:
    """Loss by alpha."""
    names = {"control-ce": "MHA, continued", "mean-gqa-ce": "GQA", "mean-mqa-ce": "MQA"}
    rows = [[names[arm], *[f"{findings.loss(arm, alpha).mean:.3f}" for alpha in _SHOWN]] for arm in arms]
    rows += [
        [f"{names[arm]}, above MHA", *[words.nats(findings.gap(arm, alpha), sign=True) for alpha in _SHOWN]]
        for arm in arms
        if arm != CONTROL
    ]
    return table(["alpha", *[f"{alpha:g}" for alpha in _SHOWN]], rows)


def table_1(name: str, findings: Findings, speed: dict[str, Any]) -> str:
    """Quality of the four models (converted ones after alpha 0.05), beside decode time."""
    converted = {
        "MHA large, continued by 5 %": "control-ce",
        "MQA large": "mean-mqa-ce",
        "GQA large": "mean-gqa-ce",
        "MQA large, `best` + distillation": "best-mqa-kd",
        "GQA large, `best` + distillation": "best-gqa-kd",
    }
    losses = {f"MHA {size}": findings.pretrained(size) for size in findings.sizes()}
    losses |= {name: findings.loss(arm, 0.05) for name, arm in converted.items() if findings.has(arm)}
    rows = []
    for model, loss in losses.items():
        timed = speed["models"][model.split(",")[0]]
        rows.append([model, f"{1000 * timed['seconds_per_sample']:.0f}", words.nats(loss)])
    behind = "an input of {:,} (without the encoder's pass)" if name == "t5" else "a cache of {:,}"
    note = (
        f"Time: decoding {speed['output_tokens']} tokens behind {behind.format(speed['context'])}, "
        f"batch {speed['batch']}, {speed['dtype']}, models of these shapes with random weights."
    )
    return table(["model", "time per sample, ms", "held-out loss"], rows) + "\n\n" + note


def _conversion_seconds(findings: Findings, arm: str, seed: int) -> float:
    return float(findings.found[seed]["arms"][arm]["conversion_seconds"])


def ours(findings: Findings) -> str:
    """Every start and objective at a few alphas."""
    rows = []
    settings_of = next(iter(findings.found.values()))["arms"]
    for arm in (*findings.arms("mqa"), *findings.arms("gqa")):
        settings = settings_of[arm]
        title = f"{settings['start']}, {settings['groups'].upper()}, "
        title += "cross-entropy" if settings["objective"] == "ce" else "distillation"
        conversion = findings.over_seeds(partial(_conversion_seconds, findings, arm))
        rows.append(
            [
                title,
                *[words.nats(findings.gap(arm, alpha), sign=True) for alpha in (0.0, 0.01, 0.05)],
                f"{conversion.mean:.1f}",
            ]
        )
    return table(
        ["start, objective: loss above MHA, continued", "at alpha 0", "at 0.01", "at 0.05", "conversion, s"], rows
    )


def savings(findings: Findings) -> str:
    """Tokens to the loss of mean pooling and cross-entropy at alpha 0.05."""
    rows, said = [], []
    for arm in (*findings.arms("mqa"), *findings.arms("gqa")):
        groups = "gqa" if "-gqa-" in arm else "mqa"
        reference = f"mean-{groups}-ce"
        if arm in (reference, f"first-{groups}-ce", f"random-{groups}-ce"):
            continue
        rows.append(_saving_row(arm, findings.saving(arm, reference)))
        if arm == f"best-{groups}-kd":
            said += _saving_sentences(findings, arm, reference, groups.upper())
    head = ["arm", "tokens, by seed", "times fewer", "calibration tokens counted", "in seconds, conversion too"]
    intro = (
        "Tokens until a run has the loss that mean pooling and cross-entropy have at alpha 0.05 "
        f"({round(0.05 * findings.total):,} tokens) with as many groups. `0`: it starts below it. "
        "Counted are uptraining tokens; the next column adds what the conversion was calibrated on."
    )
    return "\n\n".join([intro, table(head, rows), "\n".join(said)])


def _saving_row(arm: str, saving: Saving) -> list[str]:
    return [
        arm,
        ", ".join(words.count(tokens) for tokens in saving.needed),
        words.times(saving.ratio, at_least=0 in saving.needed),
        words.times(saving.ratio_with_calibration),
        words.times(saving.time_ratio),
    ]


def _saving_sentences(findings: Findings, arm: str, reference: str, groups: str) -> list[str]:
    sentence = words.saving(findings.saving(arm, reference))
    back = [
        "more than 0.1" if tokens is None else f"{tokens / findings.total:.3f}"
        for tokens in findings.tokens_for_start(reference, arm)
    ]
    return [
        f"- `best` + distillation against mean + cross-entropy at alpha 0.05, {groups}: {sentence}.",
        f"- To the loss that `best` has before any uptraining, mean + cross-entropy needs an alpha of "
        f"{', '.join(back)} (by seed; {groups}).",
    ]
