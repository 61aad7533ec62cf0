#!/usr/bin/env python3
"""Fit merged layers to other targets, by other measures of error, than the refit does, on a model's first layers.

    python scripts/bench/refit_targets.py ORIGINAL FAST --calibrate TEXT --texts en=EN.jsonl py=PY.jsonl --out FILE

FAST is a conversion of ORIGINAL without refit (`--preset fast`); both are Llama-like. Layer by layer, q, k, v and o of
its first layers are trained as `--preset best` trains them (steps, tokens, learning rates), on what the layers before
give, towards what a row says. Then they stand in the original, the rest of which is unchanged, and the rise of the
loss and the divergence (KL) are measured on the first windows of every text. Written row by row; started again with the
same `--out`, it goes on where it stopped.

Shapes: N windows, T tokens, X width.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from heal_quality import named
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gqa_convert.calibrate.descent import DescentOptions, held_out, schedule, tensor_lr
from gqa_convert.calibrate.quick import quick_products
from gqa_convert.calibrate.tokens import calibration_tokens


@dataclass(frozen=True)
class Row:
    """One way to fit a layer.

    Attributes:
        drift: share of what earlier layers have lost that this one is asked to make up for.
        whole: the layer's output is fitted, its MLP in the loop, and not the attention's alone.
        metric: this share of the measure weighs errors by how far they move the logits, to second order: with g the
            gradient of the likelihood of tokens that the original draws, `e^T E[g g^T] e`. The rest is a plain square.
        token: every token's error is divided by its target's size to this power.
        steps: of each layer, as a multiple of the usual ones.
        solved: o is solved for by least squares before the first step, and at so many looks at the held-out windows
            (six in a descent, the last one after its end).
        together: so many layers are trained at once towards the last one's output, for as many steps as one takes.
        forced: layers are given what the original's layers before give, not what the fitted ones do.
        maps: weight of the divergence of attention's weights (KL, mean over queries and heads) beside the error.
        mlp: the MLP's last matrix is trained too.
    """

    drift: float = 0.0
    whole: bool = False
    metric: float = 0.0
    token: float = 0.0
    steps: float = 1.0
    solved: tuple[int, ...] = ()
    together: int = 1
    forced: bool = False
    maps: float = 0.0
    mlp: bool = False


ROWS = {
    "as it is": Row(),
    "half of the drift": Row(drift=0.5),
    "all of the drift": Row(drift=1.0),
    "metric .9": Row(metric=0.9),
    "metric .9, half of the drift": Row(metric=0.9, drift=0.5),
    "metric .9, all of the drift": Row(metric=0.9, drift=1.0),
    "metric .5": Row(metric=0.5),
    "by token": Row(token=1.0),
    "the layer's output": Row(whole=True, drift=1.0),
    "the layer's output, MLP trained too": Row(whole=True, drift=1.0, mlp=True),
    "two layers together": Row(whole=True, drift=1.0, together=2),
    "two layers together, twice the steps": Row(whole=True, drift=1.0, together=2, steps=2.0),
    "four layers together": Row(whole=True, drift=1.0, together=4),
    "four layers together, four times the steps": Row(whole=True, drift=1.0, together=4, steps=4.0),
    "two layers together, on the original's stream": Row(whole=True, together=2, forced=True),
    "on the original's stream": Row(forced=True),
    "attention's weights too": Row(maps=0.1),
    "attention's weights above all": Row(maps=1.0),
    "three times the steps": Row(steps=3.0),
    "ten times the steps": Row(steps=10.0),
    "o solved first": Row(solved=(0,)),
    "o solved last": Row(solved=(6,)),
    "o solved at every look": Row(solved=(0, 1, 2, 3, 4, 5, 6)),
    "o solved first, all of the drift": Row(solved=(0,), drift=1.0),
    "metric .9, all of the drift, three times the steps": Row(metric=0.9, drift=1.0, steps=3.0),
}


def main() -> None:
    """Run the rows that are not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("fast")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--texts", type=named, nargs="+", required=True, help="name=text of each kind to measure on")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=list(ROWS), help=f"of {'; '.join(ROWS)}")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    trial = Trial(args)
    rows: dict[str, Any] = json.loads(args.out.read_text())["rows"] if args.out.is_file() else {}
    for name in args.rows:
        if name in rows:
            continue
        started = time.process_time()
        layers = trial.fit(ROWS[name])
        rows[name] = {"processor_seconds": round(time.process_time() - started, 1), **trial.measure(layers)}
        print(name, json.dumps(rows[name]), flush=True)
        settings = {n: getattr(args, n) for n in ("layers", "sequences", "length", "steps", "windows")}
        versions = {n: version(n) for n in ("gqa-convert", "torch", "transformers")}
        machine = {"processor": platform.machine(), "python": platform.python_version()}
        described = {"model": Path(args.original).name, **settings, "versions": versions, "machine": machine}
        args.out.write_text(json.dumps({**described, "rows": rows}, indent=1) + "\n")
    names = [name for name, _ in args.texts]
    print("\n| row | " + " | ".join(names) + " | processor s |\n|---|" + "--:|" * (len(names) + 1))
    for name, row in rows.items():
        cells = (f"{row[text]['increase']:+.3f} (KL {row[text]['kl']:.3f})" for text in names)
        print(f"| {name} | " + " | ".join(cells) + f" | {row['processor_seconds']:.0f} |")


class Trial:
    """The two models, what goes through the original's layers, and the texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args = args
        self.original = AutoModelForCausalLM.from_pretrained(args.original, dtype=torch.float32).eval()
        self.original.requires_grad_(False)
        converted = AutoModelForCausalLM.from_pretrained(args.fast, dtype=torch.float32).eval()
        self.merged: list[nn.Module] = list(converted.model.layers[: args.layers])
        tokenizer = AutoTokenizer.from_pretrained(args.original)
        self.ids_NT = calibration_tokens(args.calibrate, tokenizer, sequences=args.sequences, length=args.length)
        self.held_out = {
            name: calibration_tokens(text, tokenizer, sequences=args.windows, length=args.length)
            for name, text in args.texts
        }
        with torch.no_grad():
            embedded = self.original.model.embed_tokens(self.ids_NT)
            places = torch.arange(args.length)[None]
            self.rotary = self.original.model.rotary_emb(embedded, places)
        self.embedded_NTX: Tensor = embedded
        self.moments = self._moments()

    def _moments(self) -> list[Tensor]:
        """E[g g^T] (X, X) of each layer's attention output, over a quarter of the windows."""
        layers = self.original.model.layers[: self.args.layers]
        sums = [torch.zeros(self.embedded_NTX.shape[-1], self.embedded_NTX.shape[-1]) for _ in layers]
        seen: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> Any:
            # The first one is where the gradient begins: nothing before it asks for one.
            value = output[0] if output[0].requires_grad else output[0].requires_grad_()
            value.retain_grad()
            seen.append(value)
            return (value, *output[1:])

        handles = [layer.self_attn.register_forward_hook(keep) for layer in layers]
        for ids_T in self.ids_NT[::4]:
            seen.clear()
            logits = self.original(ids_T[None], use_cache=False).logits[0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
            for total, value in zip(sums, seen, strict=True):
                assert value.grad is not None
                total += value.grad[0].T @ value.grad[0]
        for handle in handles:
            handle.remove()
        return sums

    def call(self, layers: Sequence[Any], input_NTX: Tensor, whole: bool = True) -> Tensor:
        """The output of the last of some layers in a row, or of the attention of a single one."""
        if not whole:
            (layer,) = layers
            normed = layer.input_layernorm(input_NTX)
            result: Tensor = layer.self_attn(normed, position_embeddings=self.rotary, attention_mask=None)[0]
            return result
        result = input_NTX
        for layer in layers:
            result = layer(result, position_embeddings=self.rotary, attention_mask=None)
        return result

    def weights(self, layer: Any, input_NTX: Tensor) -> Tensor:
        """Log of the attention weights of a layer, (N, heads, T, T)."""
        normed, attention = layer.input_layernorm(input_NTX), layer.self_attn
        q, k = (
            part(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.rotary)
        scores: Tensor = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * attention.scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -1e9).log_softmax(-1)

    def apart(
        self, student: Any, here_NTX: Tensor, teacher: Any, there_NTX: Tensor, times: float, chosen: list[int]
    ) -> Tensor:
        """So many times the KL of a layer's attention weights from the original's, mean over queries and heads."""
        with torch.no_grad():
            true = self.weights(teacher, there_NTX[chosen])
        seen = self.weights(student, here_NTX[chosen])
        return times * (true.exp() * (true - seen)).sum(-1).mean()

    @torch.no_grad()
    def solve_o(self, layer: Any, chosen: list[int], input_NTX: Tensor, target_NTX: Tensor) -> None:
        """Least squares for o's weight on these windows, with a thousandth of the mean square as ridge."""
        seen: list[Tensor] = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        width = layer.self_attn.o_proj.weight.shape[1]
        square, mixed = torch.zeros(width, width), torch.zeros(width, target_NTX.shape[-1])
        for first in range(0, len(chosen), 4):
            seen.clear()
            windows = chosen[first : first + 4]
            self.call([layer], input_NTX[windows], whole=False)
            square += seen[0].T @ seen[0]
            mixed += seen[0].T @ target_NTX[windows].flatten(0, 1)
        handle.remove()
        square.diagonal().add_(1e-3 * square.diagonal().mean())
        layer.self_attn.o_proj.weight.copy_(torch.linalg.solve(square, mixed).T)

    @torch.no_grad()
    def all_windows(self, layers: Sequence[Any], input_NTX: Tensor, whole: bool = True) -> Tensor:
        """`call`, four windows at a time."""
        return torch.cat([self.call(layers, part, whole) for part in input_NTX.split(4)])

    def fit(self, row: Row) -> list[nn.Module]:
        """Fit the first layers one after the other, or some at once."""
        here_NTX = there_NTX = self.embedded_NTX
        fitted: list[nn.Module] = []
        for i in range(0, len(self.merged), row.together):
            layers = [deepcopy(merged) for merged in self.merged[i : i + row.together]]
            teachers = list(self.original.model.layers[i : i + row.together])
            given_NTX = there_NTX if row.forced else here_NTX
            target_NTX = self.all_windows(teachers, there_NTX, row.whole)
            if row.whole:
                target_NTX = target_NTX - there_NTX  # what layers add, as attention's output is what it adds
            target_NTX = target_NTX + row.drift * (there_NTX - given_NTX)
            measure = self._measure(row, i, target_NTX)
            beside = partial(self.apart, layers[0], given_NTX, teachers[0], there_NTX, row.maps) if row.maps else None
            descend(layers, row, self.args.steps, given_NTX, target_NTX, measure, self, beside)
            here_NTX, there_NTX = self.all_windows(layers, here_NTX), self.all_windows(teachers, there_NTX)
            fitted += layers
        return fitted

    def _measure(self, row: Row, i: int, target_NTX: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        width = target_NTX.shape[-1]
        square = row.metric * self.moments[i] * (width / self.moments[i].trace()) + (1 - row.metric) * torch.eye(width)
        root = torch.linalg.cholesky(square + 1e-6 * torch.eye(width)) if row.metric else None
        scale = float((target_NTX if root is None else target_NTX @ root).square().mean())

        def measure(error: Tensor, target: Tensor) -> Tensor:
            if root is not None:
                error = error @ root
            if row.token:
                size = target.square().mean(-1, keepdim=True).sqrt() + 0.1 * scale**0.5
                error = error / size**row.token
                return error.square().mean()
            return error.square().mean() / scale

        return measure

    @torch.no_grad()
    def measure(self, layers: list[nn.Module]) -> dict[str, Any]:
        """Rise of the loss and KL on every text with these layers in the original's place."""
        kept = self.original.model.layers
        placed = nn.ModuleList([*layers, *kept[len(layers) :]])
        found = {}
        for name, ids_NT in self.held_out.items():
            rise = kl = 0.0
            for ids_T in ids_NT:
                log_t = self.original(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
                self.original.model.layers = placed
                log_s = self.original(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
                self.original.model.layers = kept
                gap = (log_t - log_s).gather(1, ids_T[1:, None])
                rise += float(gap.mean()) / len(ids_NT)
                kl += float(functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")) / len(ids_NT)
            found[name] = {"increase": rise, "kl": kl}
        return found


def descend(
    layers: list[Any],
    row: Row,
    steps: int,
    input_NTX: Tensor,
    target_NTX: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor],
    trial: Trial,
    beside: Callable[[list[int]], Tensor] | None = None,
) -> None:
    """Train q, k, v and o of layers as `calibrate.descent` does: 2,048 tokens a step, the best of six looks."""
    options = DescentOptions(steps=round(steps * row.steps))
    parts = []
    for layer in layers:
        layer.requires_grad_(False)
        attention = layer.self_attn
        parts += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        parts += [layer.mlp.down_proj] if row.mlp else []
    weights = [part.weight.requires_grad_() for part in parts]
    groups = [{"params": [w], "lr": tensor_lr(w, w, options)} for w in weights]
    peaks = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(groups, betas=options.betas, eps=1e-12, foreach=False)
    generator = torch.Generator().manual_seed(0)
    train, check = held_out(len(input_NTX))
    each = max(1, 2048 // input_NTX.shape[1])
    order: list[int] = []

    def error(chosen: list[int]) -> Tensor:
        added = trial.call(layers, input_NTX[chosen], row.whole)
        if row.whole:
            added = added - input_NTX[chosen]
        return measure(added - target_NTX[chosen], target_NTX[chosen])

    best, kept = float("inf"), [w.detach().clone() for w in weights]
    every = max(1, -(-options.steps // 6))
    for step in range(options.steps + 1):
        if step % every == 0 or step == options.steps:
            look = 6 if step == options.steps else step // every
            with torch.no_grad():
                now = float(error(check))
                if look in row.solved:
                    o = layers[0].self_attn.o_proj.weight
                    before = o.clone()
                    trial.solve_o(layers[0], train, input_NTX, target_NTX)
                    solved = float(error(check))
                    if solved > now:
                        o.copy_(before)
                    now = min(now, solved)
            if now < best:
                best, kept = now, [w.detach().clone() for w in weights]
        if step == options.steps:
            break
        while len(order) < each:
            order += [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        chosen = [order.pop() for _ in range(each)]
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, options)
        optimiser.zero_grad(set_to_none=True)
        with quick_products("cpu"):
            loss = error(chosen)
            if beside is not None:
                loss = loss + beside(chosen)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    for layer in layers:
        layer.requires_grad_(False)


if __name__ == "__main__":
    main()
