"""What was published, and what of it is run here. Figures that we do not have are said to be missing, not filled in."""

from __future__ import annotations

from dataclasses import dataclass

COMMONSENSE = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "social_iqa")
SIX = ("mmlu", "arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "winogrande")
TRANSMLA = "TransMLA (Meng et al. 2025, arXiv 2502.07864v5)"
TRANSMLA_SAYS = (
    "cache 93 % smaller; on a par again after fine-tuning on 6 billion tokens (abstract, of Llama-2-7B)",
    "its WikiText-2 figures: not at hand, look them up in the paper's table",
)
TRANSMLA_LEFT = (
    "its fine-tuning on 6 billion tokens: `gqa heal` or --uptrain-config go on from the folders that are written here",
    "its method: it caches latents for an MLA model, which another engine serves; only the size of the cache is alike",
)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A published result.

    Attributes:
        paper: where it was published.
        model: its hub id.
        groups: KV heads that are converted to.
        variants: presets or merge methods, each its own column.
        rival: what was published, line by line.
        tasks: of lm-eval; none: perplexity on `data` alone.
        control: also train original and conversion on the same tokens, and measure both.
        left: what of the publication is not run.
    """

    paper: str
    model: str
    groups: int
    variants: tuple[str, ...]
    rival: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    control: bool = False
    left: tuple[str, ...] = ()


ANCHORS = {
    "transmla-llama2": Anchor(
        paper=TRANSMLA, model="meta-llama/Llama-2-7b-hf", groups=4, variants=("mean", "fast", "best"),
        rival=TRANSMLA_SAYS, left=TRANSMLA_LEFT,
    ),
    "transmla-mistral": Anchor(
        paper=TRANSMLA, model="mistralai/Mistral-7B-v0.3", groups=4, variants=("mean", "fast", "best"),
        rival=TRANSMLA_SAYS, left=TRANSMLA_LEFT,
    ),
    "transmla-qwen2.5": Anchor(
        paper=TRANSMLA, model="Qwen/Qwen2.5-7B", groups=2, variants=("mean", "fast", "best"),
        rival=TRANSMLA_SAYS, left=TRANSMLA_LEFT,
    ),
    "mha2mla": Anchor(
        paper="MHA2MLA (Ji et al. 2025, arXiv 2502.14837v2)", model="meta-llama/Llama-2-7b-hf", groups=4,
        variants=("mean", "best"), tasks=SIX, control=True,
        rival=(
            "cache 92.19 % smaller, LongBench 1 % lower (0.5 % in v1), after 0.6 to 1 % of the pretraining data "
            "(abstract, of Llama-2-7B)",
            "its six tasks' figures: not at hand, look them up in the paper's table",
        ),
        left=("LongBench", "its models of 135M, 360M and 1.7B: name one by --model"),
    ),
    "jin": Anchor(
        paper="Align Attention Heads Before Merging Them (Jin et al. 2024, arXiv 2412.20677)",
        model="meta-llama/Llama-2-7b-hf", groups=4, variants=("mean", "aligned", "best"), tasks=COMMONSENSE,
        rival=(
            "32 -> 4 KV heads, average accuracy after supervised fine-tuning and distillation: pooled 77.0, aligned "
            "81.8, the fine-tuned original 85.5 (second hand; read the paper before quoting)",
        ),
        left=(
            "its supervised fine-tuning on the tasks' training sets, without which the averages do not compare: what "
            "is printed here is zero-shot",
            "its L0 masks, which merge heads little by little while training",
        ),
    ),
}  # fmt: skip
"""By the name of the command."""
