"""The plots, arranged as the paper's: alpha or groups along, quality (here: loss) or time up. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from findings import CONTROL, FIGURE_4, FIGURE_5, Findings

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.bbox": "tight",
}
_LINES = {
    CONTROL: ("MHA, continued", "0.3", "--"),
    "mean-gqa-ce": ("GQA, mean", "tab:blue", "-"),
    "mean-mqa-ce": ("MQA, mean", "tab:orange", "-"),
    "first-mqa-ce": ("first", "tab:brown", "-"),
    "random-mqa-ce": ("random", "tab:red", "-"),
    "aligned-mqa-ce": ("aligned", "tab:purple", "-"),
    "pca-mqa-ce": ("pca", "tab:olive", "-"),
    "best-mqa-ce": ("best", "tab:green", "-"),
    "mean-mqa-kd": ("mean, distilled", "tab:orange", ":"),
    "best-mqa-kd": ("best, distilled", "tab:green", ":"),
}


def draw(folder: Path, families: dict[str, Findings], speed: dict[str, Any]) -> None:
    """Write every figure as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        for name, findings in families.items():
            for kind, plot in (("figure-4", _figure_4), ("figure-5", _figure_5), ("starts", _starts)):
                figure = Figure(figsize=(5.6, 3.4))
                plot(figure.add_subplot(), findings)
                figure.savefig(folder / f"{name}-{kind}.png", dpi=110, metadata={"Software": None})
        figure = Figure(figsize=(5.6, 3.4))
        _figure_6(figure.add_subplot(), speed)
        figure.savefig(folder / "figure-6.png", dpi=110, metadata={"Software": None})


def _figure_4(axes: Any, findings: Findings) -> None:
    for place, arm in enumerate(reversed(FIGURE_4)):
        loss = findings.loss(arm, 0.05)
        gap = findings.gap(arm, 0.05)
        error = None if gap.high is None else gap.high - gap.mean
        axes.barh(place, loss.mean, xerr=error, color=_LINES[arm][1], height=0.6)
    control = findings.loss(CONTROL, 0.05)
    axes.axvline(control.mean, color="0.3", linestyle="--")
    axes.text(control.mean, 2.45, " MHA", color="0.3")
    axes.set_yticks(range(3), [arm.split("-")[0] for arm in reversed(FIGURE_4)])
    axes.set_xlim(left=control.mean - 0.2)
    axes.set_xlabel("held-out loss at alpha 0.05, nats per token (left is better)")


def _figure_5(axes: Any, findings: Findings) -> None:
    for arm in FIGURE_5:
        _line(axes, findings, arm, [alpha for alpha in findings.alphas(arm) if alpha < 1e-9 or alpha > 0.008])
    axes.set_xlabel("alpha, share of the pretraining steps")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()


def _starts(axes: Any, findings: Findings) -> None:
    """Our starts beside the paper's, all to one group, over log tokens; alpha 0 at the left edge."""
    least = findings.alphas("mean-mqa-ce")[1] / 2
    for arm in _LINES:
        if arm != "mean-gqa-ce" and findings.has(arm):
            _line(axes, findings, arm, [a for a in findings.alphas(arm) if a <= 0.05 + 1e-9], least)
    axes.set_xscale("log")
    axes.set_xlabel(f"alpha (the first point, drawn at {least:.4f}, is 0)")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(fontsize=8, ncol=2)


def _line(axes: Any, findings: Findings, arm: str, alphas: list[float], zero: float = 0.0) -> None:
    label, colour, style = _LINES[arm]
    along = [alpha or zero for alpha in alphas]
    means = [findings.loss(arm, alpha).mean for alpha in alphas]
    axes.plot(along, means, style, color=colour, marker="o", markersize=3, label=label)
    for seed in findings.found:  # faint: seeds differ in level more than arms do in order
        axes.plot(
            along, [findings.at(seed, arm, alpha) for alpha in alphas], style, color=colour, alpha=0.25, linewidth=0.7
        )


def _figure_6(axes: Any, speed: dict[str, Any]) -> None:
    models = sorted(speed["models"].values(), key=lambda model: model["kv_heads"])
    groups = [model["kv_heads"] for model in models]
    seconds = [model["seconds_per_sample"] for model in models]
    axes.axhline(seconds[-1], color="0.3", linestyle="--", label="MHA")
    axes.plot(groups, seconds, "-o", color="tab:blue", label="GQA")
    axes.plot(groups[:1], seconds[:1], "o", color="tab:orange", label="MQA")
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups, [str(count) for count in groups])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GQA groups")
    axes.set_ylabel("time per sample, s")
    axes.legend()
