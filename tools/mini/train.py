"""Trains the mini model from nothing: generated sentences, synthetic speech, one GPU, a few minutes.

    python -m tools.mini.train --out DIR [--minutes 6] [--espeak-root DIR] [--flite-root DIR]
    python -m tools.mini.train --out DIR --family voxtral --batch 192    # of another form; not shipped

Three things make a speech translator learn within minutes instead of hours:

* a CTC loss on the English characters from the encoder's own states (Graves et al. 2006; as an auxiliary task in speech
  translation: Bahar et al. 2019). It forces the encoder to spell out the speech from the first step on, so the decoder
  soon finds words in the audio instead of guessing from its language model. Its head is thrown away at the end;
* one encoder pass and one prompt per clip for both target languages (see `network`);
* large batches of clips of similar length, since a model this small is bound by launching kernels.

LayerDrop (Fan, Grave, Joulin 2020, "Reducing Transformer Depth on Demand with Structured Dropout") skips decoder layers
at random. Large pretrained models, which this one stands in for, survive the loss of a layer; a small one trained
briefly on a narrow task has no reason to, unless training shows it such losses. The first and the last layer always run,
as pruning never removes them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from tools.mini import network
from tools.mini.blueprint import BLUEPRINTS, Blueprint, blueprint_named
from tools.mini.evaluation import check_against_transformers, check_saved, evaluate, translate
from tools.mini.material import Batch, Batches, Speech, as_speech, evaluation_pairs, say, speak, training_pairs
from tools.mini.network import LogMel, Packer
from tools.mini.speech import Engines

RESERVE_S = 45.0  # kept back from --limit-minutes for saving and the last evaluation


def disturb(waves: Tensor, samples: Tensor) -> Tensor:
    """Another level and a little noise for every clip, inside the clip only (what follows is padding)."""
    clips = len(waves)
    gain = torch.empty(clips, 1, device=waves.device).uniform_(0.3, 1.3)
    hiss = 10 ** torch.empty(clips, 1, device=waves.device).uniform_(-4.0, -2.2)
    inside = torch.arange(waves.shape[1], device=waves.device) < samples[:, None]
    return waves * gain + torch.randn_like(waves) * hiss * inside


class Losses(nn.Module):
    """The model with the CTC head it needs in training only."""

    def __init__(self, blueprint: Blueprint, model: Any, log_mel: LogMel, characters: int) -> None:
        super().__init__()
        width = model.config.audio_config.d_model
        self.blueprint, self.model, self.log_mel = blueprint, model, log_mel
        self.ctc_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters + 1))

    def forward(self, batch: Batch, keep: Sequence[bool], augment: bool) -> tuple[Tensor, Tensor]:
        mel = self.log_mel(disturb(batch.waves, batch.samples) if augment else batch.waves)
        mel = network.spec_augment(mel) if augment else mel
        states, heard = self.blueprint.encode(self.model, mel, batch.frames)
        spelled = states[:, : int(batch.ctc_steps.max())]
        log_probs = self.ctc_head(spelled).float().log_softmax(-1).transpose(0, 1)
        ctc = nn.functional.ctc_loss(
            log_probs, batch.characters, batch.ctc_steps, batch.character_counts, zero_infinity=True
        )
        logits = network.decode(self.model, batch.packed, heard, batch.num_audio, keep)
        return nn.functional.cross_entropy(logits.float(), batch.packed.targets), ctc


@dataclass
class Run:
    """What the training loop measured."""

    steps: int = 0
    clips: int = 0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)


class Trainer:
    """The loop. The learning rate follows the larger share of time or steps, so it always lands at zero in time."""

    def __init__(self, args: argparse.Namespace, losses: Losses, batches: Batches, deadline: float) -> None:
        self._args, self._losses, self._deadline = args, losses, deadline
        self._batches = iter(batches)
        self._device = next(losses.parameters()).device
        self._rng = np.random.default_rng(args.seed + 1)
        matrices = [p for p in losses.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in losses.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=self._device.type == "cuda")
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        say("told to stop: saving")
        self._stop = True

    def _rate(self, progress: float) -> float:
        warm_up = 0.04
        if progress < warm_up:
            return self._args.lr * max(progress, 0.001) / warm_up
        return self._args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))

    def _keep(self) -> list[bool]:
        layers = len(self._losses.model.model.language_model.layers)
        kept = self._rng.random(layers) >= self._args.layerdrop
        kept[[0, -1]] = True
        return kept.tolist()

    def _step(self) -> tuple[Tensor, Tensor]:
        batch = next(self._batches)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            answer, ctc = self._losses(batch, self._keep(), augment=not self._args.overfit)
        (answer + self._args.ctc_weight * ctc).backward()
        nn.utils.clip_grad_norm_(self._losses.parameters(), 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return answer.detach(), ctc.detach()

    def train(self, evaluate: Callable[[str], dict]) -> Run:
        """Until the time or the steps are used up, or a SIGTERM; evaluations count as training time."""
        args, run, began = self._args, Run(), time.monotonic()
        budget = min(60 * args.minutes, self._deadline - began)
        sums, counted, last_line, last_evaluation = torch.zeros(2, device=self._device), 0, began, began
        self._losses.train()
        while not self._stop:
            now = time.monotonic()
            run.seconds = round(now - began, 1)
            progress = max(run.seconds / budget, run.steps / args.steps if args.steps else 0.0)
            if now - last_line >= args.log_every or (progress >= 1 and counted):
                answer, ctc = (sums / counted).tolist()
                speed = round(counted * args.batch / (time.monotonic() - last_line))
                run.log.append({"step": run.steps, "s": run.seconds, "answer": round(answer, 4), "ctc": round(ctc, 4)})
                say(f"step {run.steps}  {run.seconds:.0f} s  answer {answer:.4f}  ctc {ctc:.4f}  {speed} clips/s")
                sums.zero_()
                counted, last_line = 0, time.monotonic()
            if progress >= 1:
                break
            if args.eval_every and now - last_evaluation >= args.eval_every and progress < 0.9:
                run.evaluations.append({"step": run.steps, "s": run.seconds, **evaluate(f"step {run.steps}")})
                self._losses.train()
                spent = time.monotonic() - now
                last_line, last_evaluation = last_line + spent, now + spent  # the speed shown is of training alone
            for group in self._optimiser.param_groups:
                group["lr"] = self._rate(progress)
            sums += torch.stack(self._step())
            run.steps, run.clips, counted = run.steps + 1, run.clips + args.batch, counted + 1
        return run


def parse() -> argparse.Namespace:
    """The command line; --smoke and --overfit overrule what would make them slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model, its processor and mini_train.json")
    add("--family", choices=BLUEPRINTS, default="qwen2_audio", help="whose form the model has")
    add("--num-everyday", type=int, default=56_000, help="everyday sentences")
    add("--num-research", type=int, default=6_000, help="research-talk sentences with the background lexicon")
    add("--renditions", type=int, default=2, help="speakers per sentence")
    add("--synthesis-minutes", type=float, default=2.0, help="then train on what has been spoken so far")
    add("--minutes", type=float, default=6.0, help="wall-clock budget of the training loop")
    add("--limit-minutes", type=float, default=9.4, help="wall-clock limit of the whole command; training ends earlier")
    add("--steps", type=int, help="stop after so many steps; default: time decides")
    add("--batch", type=int, default=384, help="clips a step (each trains both languages)")
    add("--lr", type=float, default=1.5e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--layerdrop", type=float, default=0.1, help="chance that an inner decoder layer is skipped in a step")
    add("--ctc-weight", type=float, default=0.5)
    add("--eval-every", type=float, default=90.0, help="seconds between quick evaluations; 0: none")
    add("--log-every", type=float, default=15.0, help="seconds between progress lines")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count() or 1, help="synthesis processes")
    add("--espeak-root", help="folder with libespeak-ng.so and espeak-ng-data; default: the system's")
    add("--flite-root", help="folder with libflite*.so; default: the system's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--smoke", action="store_true", help="a few hundred clips and a few steps, to see that everything runs")
    add("--overfit", type=int, default=0, help="learn so many clips by heart, undisturbed, and score on them (a check)")
    args = parser.parse_args()
    if args.smoke:
        args.num_everyday, args.num_research, args.renditions, args.steps, args.batch = 300, 60, 1, 12, 16
        args.minutes, args.log_every, args.eval_every = 3.0, 5.0, 0.0
    if args.overfit:
        args.num_everyday, args.num_research, args.renditions = args.overfit, 0, 1
        args.layerdrop, args.eval_every = 0.0, 0.0
    return args


def command_line(args: argparse.Namespace) -> str:
    """What to type to get this model again, without this machine's folders."""
    not_settings = ("out", "espeak_root", "flite_root", "workers", "device")
    words = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items()
             if name not in not_settings and value is not None and not isinstance(value, bool)]  # fmt: skip
    return " ".join(["python -m tools.mini.train --out DIR", *words])


def machine(device: torch.device) -> dict:
    """What it ran on, by kind; no names of hosts or folders."""
    return {
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers, sacrebleu, np)},
    }


def make_speech(args: argparse.Namespace) -> tuple[Speech, Speech]:
    """Training and evaluation clips, on the host. Forks workers, so it comes before anything that starts threads."""
    engines = Engines(args.espeak_root, args.flite_root)
    heard = evaluation_pairs(20 if args.smoke or args.overfit else None)
    evaluation = as_speech(heard, *speak(heard, engines, args.workers))
    pairs = training_pairs(args)
    training = as_speech(pairs, *speak(pairs, engines, args.workers, 60 * args.synthesis_minutes))
    say(f"{len(training.sentences)} training clips, {training.hours:.1f} h; {len(evaluation.sentences)} for evaluation")
    return training, training if args.overfit else evaluation


class Stopwatch:
    """Seconds per phase of the command."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic()
        self.phases: dict[str, float] = {}

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self.phases[name], self._last = round(now - self._last, 1), now
        say(f"[{now - self.began:.0f} s] {name} took {self.phases[name]} s")


def write_report(folder: Path, report: dict) -> None:
    """Written after every late phase, so that a command cut short still leaves its numbers."""
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    (folder / "mini_train.json").write_text(text, encoding="utf-8")


def judge(label: str, model: Any, packer: Packer, log_mel: LogMel, sample: Speech, longest: int) -> dict:
    """Scores of the sample's translations."""
    model.eval()
    mixed = model.device.type == "cuda" and model.dtype == torch.float32
    with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        return evaluate(lambda language: translate(model, packer, log_mel, sample, language, longest), sample, label)


def main() -> None:
    """Speech, tokenizer, training, saving, scores: in this order, as each needs the one before."""
    watch, args = Stopwatch(), parse()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device, blueprint = torch.device(args.device), blueprint_named(args.family)
    training, evaluation = make_speech(args)
    watch.phase("speech")
    texts = {text for sentence in set(training.sentences) for text in (sentence.de, sentence.zh)}
    args.out.mkdir(parents=True, exist_ok=True)
    processor = blueprint.processor(sorted(texts), args.out)
    watch.phase("tokenizer")
    model, packer = network.build_model(blueprint, processor).eval(), Packer(blueprint, processor)
    gaps = check_against_transformers(model, packer, processor, evaluation)
    say(f"{model.num_parameters():,} parameters; training path against plain transformers in fp32: {gaps}")
    training.samples, evaluation.samples = training.samples.to(device), evaluation.samples.to(device)
    log_mel = LogMel(processor.feature_extractor)
    batches = Batches(training, packer, args.batch, args.seed)
    args.batch = batches.size
    losses = Losses(blueprint, model, log_mel, len(batches.alphabet)).to(device)
    longest, quick = 2 * batches.longest_answer, evaluation.every(2)  # unknown words take more tokens than known ones
    watch.phase("setup")
    trainer = Trainer(args, losses, batches, watch.began + 60 * args.limit_minutes - RESERVE_S)
    run = trainer.train(lambda label: judge(label, model, packer, log_mel, quick, longest))
    watch.phase("training")
    model.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    watch.phase("saving")
    report: dict = {
        "command": command_line(args), "machine": machine(device), "parameters": model.num_parameters(),
        "hours_of_speech": round(training.hours, 2), "clips": len(training.sentences), "too_long": batches.dropped,
        "distinct_sentences": len(set(training.sentences)), "vocabulary": len(processor.tokenizer),
        "steps": run.steps, "clips_seen": run.clips, "training_seconds": run.seconds, "against_transformers": gaps,
        "phases_s": watch.phases, "losses": run.log, "evaluations": run.evaluations,
    }  # fmt: skip
    write_report(args.out, report)
    saved = blueprint.family.transformers_class.from_pretrained(args.out, dtype=torch.bfloat16).to(device)
    report["scores"] = judge("saved, bf16", saved, packer, log_mel, evaluation, longest)
    watch.phase("evaluation")
    write_report(args.out, report)
    report["plain_generate_is_equal"] = check_saved(blueprint, args.out, evaluation, longest)
    report["bytes"] = {path.name: path.stat().st_size for path in sorted(args.out.iterdir()) if path.is_file()}
    watch.phase("check of the saved folder")
    write_report(args.out, report)
    say(f"plain generate gives the same text: {report['plain_generate_is_equal']}; {run.steps} steps; done")


if __name__ == "__main__":
    main()
