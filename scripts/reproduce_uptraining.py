#!/usr/bin/env python3
"""The headline: how far does a better start and a teacher bring a converted model, against the paper's recipe?

Every cell is one short uptraining of the subject; each finished cell is a line of cells.jsonl, so an interrupted run loses nothing.
An arm is a group count, a start, a loss and a budget: its learning rate is chosen at seed 0 from the same grid as every arm's, which
grows by a rate where the best is at an end; then the other seeds run at the best. `--report` only makes the tables of what is there.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint, trainable
from headfold.export.conversion.checkpoint import convert_checkpoint
from headfold.export.conversion.layers import ConvertOptions, Init
from headfold.export.data.token_data import tokenize
from headfold.export.model.config import ModelConfig
from headfold.export.progress import Reporter
from headfold.export.training.evaluation import evaluate
from headfold.export.training.loop import train
from headfold.export.training.losses import Loss
from headfold.export.training.options import TrainOptions
from headfold.runtime.errors import TrainingError

sys.path.insert(0, str(Path(__file__).parent))
from train_subject import BATCH as PRETRAIN_BATCH
from train_subject import CONTEXT, CORPUS, STEPS, SUBJECT

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "bundles" / "uptraining"
RATES = [float(f"{5e-4 * 3.0**power:.3g}") for power in range(-2, 6)]
FIRST_RATES = RATES[2:5]  # 5e-4, 1.5e-3, 4.5e-3
BATCH, SEEDS, VALIDATION, CALIBRATION = 8, 3, 256, 32  # sequences, seeds, sequences, sequences
PRETRAIN_TOKENS = STEPS * PRETRAIN_BATCH * CONTEXT
Budget = Literal["0.05", "0.005", "flops"]  # flops: as many as the paper's recipe takes at 0.05, the teacher counted
HEADS = 8


@dataclass(frozen=True)
class Arm:
    """What is compared. `groups` of 8 is the control: the MHA model, trained on."""

    groups: int
    init: Init
    loss: Loss
    budget: Budget

    @property
    def name(self) -> str:
        return "MHA control" if self.groups == HEADS else f"{self.init}+{self.loss}"


ARMS = (
    *(Arm(g, "mean", "ce", "0.05") for g in (2, 1)),
    *(Arm(g, "svd", "kl", "0.005") for g in (2, 1)),
    Arm(HEADS, "mean", "ce", "0.05"),
    *(Arm(g, "svd", "kl", "0.05") for g in (2, 1)),
    *(Arm(g, *recipe) for g in (2, 1) for recipe in (("first", "ce", "0.05"), ("random", "ce", "0.05"))),
    *(Arm(g, "mean", "ce", "0.005") for g in (2, 1)),
    Arm(HEADS, "mean", "ce", "0.005"),
    *(Arm(g, "svd", "kl", "flops") for g in (2, 1)),
    *(Arm(g, "svd", "ce", "0.05") for g in (2, 1)),
    *(Arm(g, "mean", "kl", "0.05") for g in (2, 1)),
    *(Arm(g, "procrustes", "ce", "0.05") for g in (2, 1)),
)


def forward_flops(config: ModelConfig) -> float:
    """Of one token in a sequence of CONTEXT: two per weight of a matrix, and the attention's two products."""
    c, h = config, config.hidden_size
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    weights = c.num_hidden_layers * (h * c.head_dim * heads + 3 * h * c.intermediate_size) + h * c.vocab_size
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * CONTEXT / 2
    return 2 * weights + 4 * attention


class Bench:
    """The subject, its data, and the cells that are done."""

    def __init__(self, output: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(SUBJECT)
        self.config = self.checkpoint.config
        self.data, self.validation = (
            tokenize([str(CORPUS / name)], self.checkpoint.tokenizer.definition, self.config, Reporter(quiet=True))
            for name in ("train.txt", "validation.txt")
        )
        self.teacher, self.file = load_decoder(self.checkpoint), output / "cells.jsonl"

    def steps(self, arm: Arm, config: ModelConfig) -> int:
        share = float(arm.budget) if arm.budget != "flops" else 0.05
        steps = round(PRETRAIN_TOKENS * share / (BATCH * CONTEXT))
        if arm.budget == "flops":
            student = 3 * forward_flops(config)  # forward and backward
            steps = round(steps * student / (student + forward_flops(self.config)))
        return steps

    def cell(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """Convert, uptrain, evaluate."""
        start = time.time()
        calibration = self.data.batch(1000 + seed, 0, CALIBRATION, CONTEXT)[:, :-1]
        options = ConvertOptions(arm.groups, arm.init, seed=seed)
        quiet = Reporter(quiet=True)
        conversion = convert_checkpoint(self.checkpoint, options, calibration, quiet, self.teacher)
        student = trainable(conversion.checkpoint)
        before = evaluate(student, self.validation, CONTEXT, VALIDATION)
        steps = self.steps(arm, conversion.checkpoint.config)
        settings = TrainOptions(
            steps, BATCH, CONTEXT, rate, loss=arm.loss, seed=seed, evaluate_sequences=VALIDATION, cpu=True
        )
        teacher = self.teacher if arm.loss != "ce" else None
        try:
            trained = train(student, self.data, settings, teacher=teacher)
            tokens, after = trained.tokens, evaluate(trained.decoder, self.validation, CONTEXT, VALIDATION)
        except TrainingError:  # it diverged: this rate is too high
            tokens, after = steps * BATCH * CONTEXT, math.inf
        flops = forward_flops(conversion.checkpoint.config) * 3 + (forward_flops(self.config) if teacher else 0)
        return {
            **asdict(arm),
            "rate": rate,
            "seed": seed,
            "steps": steps,
            "tokens": tokens,
            "flops": flops * tokens,
            "before": before,
            "after": after,
            "layer_errors": conversion.errors,
            "seconds": round(time.time() - start, 1),
        }

    def done(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def once(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """The cell, from the file if it is there."""
        for cell in self.done():
            if of(cell, arm) and cell["rate"] == rate and cell["seed"] == seed:
                return cell
        cell = self.cell(arm, rate, seed)
        with self.file.open("a") as file:
            file.write(json.dumps(cell) + "\n")
            file.flush()
            os.fsync(file.fileno())
        kind = f"{arm.groups} groups, {arm.name}, {arm.budget}"
        print(
            f"{kind}: rate {rate:g}, seed {seed}: {cell['before']:.4f} -> {cell['after']:.4f}, {cell['seconds']} s",
            flush=True,
        )
        return cell

    def tune(self, arm: Arm) -> float:
        """The arm's best rate at seed 0, with a worse one on either side of it."""
        tried = {rate: self.once(arm, rate, 0)["after"] for rate in FIRST_RATES}
        while missing := neighbours(tried) - tried.keys():
            tried |= {rate: self.once(arm, rate, 0)["after"] for rate in missing}
        return min(tried, key=tried.__getitem__)

    def run(self, arms: Sequence[Arm]) -> None:
        """All arms are tuned at seed 0 before any gets its other seeds, so that an early report has every comparison."""
        tuned = [self.tune(arm) for arm in arms]
        for seed in range(1, SEEDS):
            for arm, rate in zip(arms, tuned, strict=True):
                self.once(arm, rate, seed)


def neighbours(tried: dict[float, float]) -> set[float]:
    """The rates beside the best of those tried."""
    at = RATES.index(min(tried, key=tried.__getitem__))
    return {*RATES[max(at - 1, 0) : at + 2]}


def of(cell: dict[str, Any], arm: Arm) -> bool:
    return all(cell[name] == value for name, value in asdict(arm).items())


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per arm: its tuned rate, and mean and standard deviation of the loss over the seeds that are there at that rate."""
    rows = []
    for arm in ARMS:
        mine = [cell for cell in cells if of(cell, arm)]
        tuning = [cell for cell in mine if cell["seed"] == 0]
        if not tuning:
            continue
        tried = {cell["rate"]: cell["after"] for cell in tuning}
        rate = min(tried, key=tried.__getitem__)
        chosen = [cell for cell in mine if cell["rate"] == rate]
        losses = [cell["after"] for cell in chosen]
        rows.append(
            {
                **asdict(arm),
                "name": arm.name,
                "rate": rate,
                "tuned": not neighbours(tried) - tried.keys(),
                "seeds": len(losses),
                "steps": chosen[0]["steps"],
                "flops": chosen[0]["flops"],
                "before": statistics.mean(cell["before"] for cell in chosen),
                "after": statistics.mean(losses),
                "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            }
        )
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The claims, each with its figures, holding or not."""

    def find(groups: int, name: str, budget: str) -> dict[str, Any] | None:
        return next((r for r in rows if (r["groups"], r["name"], r["budget"]) == (groups, name, budget)), None)

    lines = []
    for groups in (2, 1):
        paper, tenth = find(groups, "mean+ce", "0.05"), find(groups, "svd+kl", "0.005")
        equal, matched = find(groups, "svd+kl", "0.05"), find(groups, "svd+kl", "flops")
        control = find(HEADS, "MHA control", "0.05")
        if paper and tenth:
            holds = "holds" if tenth["after"] < paper["after"] else "does NOT hold"
            lines.append(
                f"{groups} groups: svd+kl at alpha 0.005 ({tenth['after']:.4f}) below mean+ce at 0.05 ({paper['after']:.4f}): {holds}; "
                f"{paper['flops'] / tenth['flops']:.1f} times fewer FLOPs"
            )
        for label, row in (("equal alpha 0.05", equal), ("equal FLOPs", matched)):
            if paper and row and control:
                share = (paper["after"] - row["after"]) / (paper["after"] - control["after"])
                verdict = "holds" if share >= 0.7 else "does NOT hold"
                unequal = any(not r["tuned"] or r["seeds"] < SEEDS for r in (paper, row, control))
                verdict += "; PRELIMINARY: rates or seeds are missing" if unequal else ""
                claim = f"svd+kl closes {share:.0%} of mean+ce's gap to the MHA control"
                lines.append(f"{groups} groups, {label}: {claim} (70%: {verdict})")
        order = [
            (r["after"], init) for init in ("mean", "first", "random") if (r := find(groups, f"{init}+ce", "0.05"))
        ]
        if len(order) == 3:
            lines.append(
                f"{groups} groups, order of the paper's starts, best first: {', '.join(n for _, n in sorted(order))}"
            )
    return lines


def report(bench: Bench, output: Path) -> None:
    cells = bench.done()
    rows, base = summary(cells), evaluate(bench.teacher, bench.validation, CONTEXT, VALIDATION)
    lines = [
        f"Subject: MHA, {HEADS} heads, {PRETRAIN_TOKENS:,} pretraining tokens, validation loss {base:.4f} nats per byte.",
        "",
        "| groups | start+loss | alpha | steps | GFLOPs | after conversion | after uptraining | sd | seeds | rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f"{row['deviation']:.4f}" if row["deviation"] is not None else "-"
        mark = "" if row["tuned"] else " (not tuned yet)"
        lines.append(
            f"| {row['groups']} | {row['name']} | {row['budget']} | {row['steps']} | {row['flops'] / 1e9:,.0f} | {row['before']:.4f} "
            f"| {row['after']:.4f} | {spread} | {row['seeds']} | {row['rate']:g}{mark} |"
        )
    lines += ["", *(f"- {line}" for line in verdicts(rows)), "", "Every cell:", ""]
    lines += [
        "| groups | start+loss | alpha | rate | seed | before | after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        for cell in sorted((c for c in cells if of(c, arm)), key=lambda c: (c["seed"], c["rate"])):
            figures = f"{cell['rate']:g} | {cell['seed']} | {cell['before']:.4f} | {cell['after']:.4f}"
            lines.append(f"| {arm.groups} | {arm.name} | {arm.budget} | {figures} |")
    (output / "uptraining.md").write_text("\n".join(lines) + "\n")
    content = {"subject_loss": base, "arms": rows, "verdicts": verdicts(rows), "cells": cells}
    (output / "uptraining.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--share", default="1/1", help="i/n: every n-th arm from the i-th, for several processes")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="arms by name, such as mean+ce")
    parser.add_argument("--budget", nargs="*", help="arms by budget: 0.05, 0.005, flops")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only the tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.output)
    if not options.report:
        which, count = map(int, options.share.split("/"))
        arms = [arm for arm in ARMS if arm.name in (options.only or [arm.name])]
        arms = [arm for arm in arms if arm.budget in (options.budget or [arm.budget])]
        bench.run(arms[which - 1 :: count])
    report(bench, options.output)


if __name__ == "__main__":
    main()
