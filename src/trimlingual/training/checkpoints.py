"""Checkpoints of a training: when one is written, which are whole, where a restart goes on, and what is shown of it.

One is written once the time since the last is `SHARE` times what writing it took, so that saving takes about a twentieth of the time
whatever the model's size. A run that is killed too early for that makes no progress; so after every fruitless start the next one waits
half as long, until a checkpoint is written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from trimlingual.run import interruptions
from trimlingual.run.artifacts import sync, write_json
from trimlingual.run.fingerprint import read_object
from trimlingual.run.ownership import tool_files
from trimlingual.run.processes import gather, is_main_process, wait_for_everyone
from trimlingual.run.progress import progress, say

COMPLETE_FILE = "complete.json"  # written into a checkpoint after everything else
START_FILE = "start.json"  # beside the checkpoints: where the last start went on, and how far it came
SHARE = 20
SHORTEST_S = 2.0
FIRST_GUESS = 500e6  # bytes a second, until a checkpoint has been written


class Checkpoints(TrainerCallback):
    """Decides when the Trainer saves and stops, for all processes alike (the main one's clock counts), and tells how it goes.

    `save_minutes` is the recipe's; None: by what writing takes. `resumed` is the checkpoint that training goes on from.
    """

    def __init__(self, trainer: Any, work_dir: Path, save_minutes: float | None, resumed: str | None):
        self.trainer, self.work_dir, self.save_minutes = trainer, work_dir, save_minutes
        self.resumed = resumed
        self.clock = time.monotonic
        self.interrupted = False
        self._cost = _guess(trainer.model) / FIRST_GUESS  # seconds that writing a checkpoint takes
        self._starts = 1  # starts from where this one goes on
        self._begins: list[float] = []  # seconds of the clock at which this start's steps began
        self._note = ""
        self._stack = ExitStack()  # closed when training ends, whether it comes to its end or not

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around `trainer.train()`; ends in Interrupted, after the save, if the run was asked to stop."""
        with interruptions.deferred():
            with self._stack:
                yield
            state = self.trainer.state
            if self.interrupted:
                raise interruptions.Interrupted(
                    f"training stopped after step {state.global_step} of {state.max_steps}, which is saved"
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, total = state.global_step, state.max_steps
        came = read_object(self.work_dir / START_FILE) if is_main_process() else {}
        if self.resumed:
            self._restore(read_object(Path(self.resumed) / COMPLETE_FILE))
        if came.get("from") == step:
            self._starts = came["starts"] + 1
        if came or self.resumed:
            lost = came.get("step", step) - step
            steps, are = ("steps", "are") if lost > 1 else ("step", "is")
            again = f"{lost} {steps} since that checkpoint {are} done again" if lost > 0 else "no step was lost"
            say(f"  training goes on at step {step} of {total}; {again}")
        self._advance = self._stack.enter_context(progress("training, step", total, stops=False))
        self._advance(step, earlier=True)
        self._remember(step, step)
        self._from, self._last = step, self.clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begins.append(self.clock())

    @property
    def seconds_per_step(self) -> float | None:
        """The median of this start's steps, from one's beginning to the next one's; None for fewer than two."""
        steps = [after - before for before, after in pairwise(self._begins)]
        return round(median(steps), 4) if steps else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        due = self.clock() - self._last >= self._interval()
        decided = gather((due, interruptions.asked()))
        self.interrupted = any(asked for _, asked in decided)
        if decided[0][0] or self.interrupted:
            control.should_save = True
        control.should_training_stop |= self.interrupted
        saving = "writing a checkpoint" if control.should_save and self._cost > SHORTEST_S else ""
        self._advance(1, ", ".join(filter(None, (self._note, saving))))
        self._remember(self._from, state.global_step)
        self._began = self.clock()
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stack.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._note = f"loss {logs['loss']:.4g}, learning rate {logs.get('learning_rate', 0):.3g}"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as whole: a killed run must not resume from half of one."""
        pending = gather(float(self.trainer._tr_loss))
        wait_for_everyone()  # every process has written its part
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = _files(folder) if state.is_world_process_zero else {}
        sync(folder / name for name in files)
        self._last = self.clock()
        self._cost = self._last - self._began
        self._advance(0, self._note or "checkpoint written")
        if state.is_world_process_zero:
            record = {
                "step": state.global_step,
                "step_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "seconds": round(self._cost, 3),
                "pending_loss": sum(pending) / len(pending),
                "logged_step": self.trainer._globalstep_last_logged,
                "total_loss": self.trainer._total_loss_scalar,
                "files": files,
            }
            write_json(folder / COMPLETE_FILE, record)
        self._from, self._starts = state.global_step, 0
        self._remember(state.global_step, state.global_step)

    def _restore(self, record: dict[str, Any]) -> None:
        """What the Trainer forgets: the losses since the last line of the curve, and what saving takes."""
        if "seconds" not in record:  # a checkpoint of an earlier version
            return
        self._cost = record["seconds"]
        self.trainer._tr_loss += record["pending_loss"]
        self.trainer._globalstep_last_logged = record["logged_step"]
        self.trainer._total_loss_scalar = record["total_loss"]

    def _interval(self) -> float:
        seconds = 60 * self.save_minutes if self.save_minutes else max(SHORTEST_S, SHARE * self._cost)
        return seconds / 2 ** max(0, self._starts - 1)

    def _remember(self, start: int, step: int) -> None:
        if is_main_process():
            self.work_dir.mkdir(parents=True, exist_ok=True)
            new = self.work_dir / (START_FILE + ".new")
            new.write_text(json.dumps({"from": start, "starts": self._starts, "step": step}), encoding="utf-8")
            os.replace(new, self.work_dir / START_FILE)  # not flushed to disk: at every step, and no more than a hint


def _guess(model: torch.nn.Module) -> int:
    """Bytes of a checkpoint: weights (of a PEFT model the adapter's), and two float32 moments for each that trains."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = training if hasattr(model, "peft_config") else list(model.parameters())
    return sum(p.numel() * p.element_size() for p in saved) + sum(8 * p.numel() for p in training)


def step_size_of(checkpoint: str) -> int | None:
    """Examples per optimizer step that a checkpoint was made with, all processes together; None if an earlier version wrote it."""
    return read_object(Path(checkpoint) / COMPLETE_FILE).get("step_size")


def last_complete_checkpoint(work_dir: Path) -> str | None:
    """Newest checkpoint that was written to its end and is still whole, or None; all others are removed."""
    wait_for_everyone()
    folders = [*work_dir.glob("checkpoint-*")]
    found = [folder for folder in folders if _is_whole(folder)]
    wait_for_everyone()  # none goes while another process looks at it
    if is_main_process():
        for folder in set(folders).difference(found):
            if (folder / COMPLETE_FILE).exists():
                say(f"WARNING: {folder} is damaged (files are missing or cut off), so training does not go on from it")
            shutil.rmtree(folder)
    wait_for_everyone()
    newest = max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is marked as complete and has all files that the mark lists, which those of earlier versions do not.

    Without the optimizer's file, for one, the Trainer would go on all the same, with an optimizer that has forgotten everything.
    """
    record = read_object(checkpoint / COMPLETE_FILE)
    return bool(record) and record.get("files", {}).items() <= _files(checkpoint).items()


def _files(checkpoint: Path) -> dict[str, int]:
    return {name: size for name, size in tool_files(checkpoint).items() if name != COMPLETE_FILE}
