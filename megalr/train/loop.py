"""The training loop: updates, measurements, checkpoints, until the last step or a request to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import megalr
from megalr.data import Batches, Examples
from megalr.errors import GuardError, UserError
from megalr.hosts import host_of, logical_shape
from megalr.locks import FolderLock
from megalr.train.arguments import Interval
from megalr.train.checkpoints import HELD_OUT, TOKENIZER, Notes, Resumable, load_checkpoint, save_checkpoint
from megalr.train.console import Screen
from megalr.train.ds_config import Batch
from megalr.train.evaluation import IGNORED, Evaluation, Schedule, evaluate, predicted_tokens, to_device
from megalr.train.interruption import StopRequest, agreed_reason
from megalr.train.meter import Meter, Work
from megalr.train.metrics import MetricsLog
from megalr.train.monitors import OURS_ALONE, continue_files, monitor_numbers
from megalr.train.profiling import Profile
from megalr.train.ranks import AgreedError, Ranks
from megalr.train.run_folder import RunFolder

NOTHING_TO_PREDICT = "batch has no token to predict"


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """When the loop does what.

    Attributes:
        steps: updates of the whole run.
        batch: sequences of one update.
        evaluations: those on the way.
        log_every: updates between two rows.
        save_every: updates between two checkpoints, or time, of which rank 0's clock is the measure.
        keep: how many checkpoints to leave; None for all.
        profile: updates to profile; 0 for none.
        galore_compatible_eval: show that perplexity, too.
    """

    steps: int
    batch: Batch
    evaluations: Schedule
    save_every: Interval
    log_every: int
    keep: int | None
    profile: int
    galore_compatible_eval: bool


class Loop:
    """Trains an engine; every method is collective.

    Attributes:
        step: updates made.
        began_at: updates that were made before the run was resumed, if it was; else 0.
        tokens: training tokens read, pads not counted.
        meter: times this process's updates; evaluations and checkpoints are not counted.
        last_evaluation: the latest of the whole held-out text.
        metrics: what was noted on the way.
    """

    def __init__(
        self,
        engine: Any,
        batches: Batches,
        held_out: Examples,
        settings: LoopSettings,
        *,
        tokenizer: str,
        work: Work,
        ranks: Ranks,
        folder: RunFolder,
        lock: FolderLock,
        screen: Screen,
        required: dict[str, Any],
        noted: dict[str, Any],
    ) -> None:
        """
        Args:
            engine: what ``megalr.initialize`` gives.
            batches: the training text.
            held_out: the text to evaluate on; samples are of it.
            settings: when to do what.
            tokenizer: its digest, to be kept with checkpoints.
            work: of an update.
            ranks, folder, screen: this process, where to write, where to print.
            lock: what holds the folder, on rank 0.
            required, noted: see :class:`~megalr.train.checkpoints.Notes`.
        """
        self.engine = engine
        self._host = host_of(engine)
        self._host.report_alone(OURS_ALONE)
        self.step = self.began_at = 0
        self.tokens = 0
        self.meter = Meter(work, ranks.device)
        self.last_evaluation: Evaluation | None = None
        self._batches = batches
        self._held_out = held_out
        self._settings = settings
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._folder = folder
        self._lock = lock
        self._screen = screen
        self._required, self._noted = required, noted
        self.metrics = MetricsLog(folder.metrics, enabled=ranks.is_first)
        self._saved_step: int | None = None  # begun to be written
        self._written_step: int | None = None
        self._evaluated_step: int | None = None
        self._scored_step: int | None = None  # on the whole held-out text
        self._stop_is_told = False
        self._evaluates = False
        self._profile = Profile(folder.profile, settings.profile if ranks.is_first else 0)
        self._bytes_moved = self._host.optimizer.bytes_moved

    def resume(self, checkpoint: Resumable) -> None:
        """Go on from a checkpoint."""
        notes = checkpoint.notes
        with self._ranks.together():
            data = load_checkpoint(self.engine, checkpoint.manifest)
            self._batches.load_state_dict(data)
            self._check_held_out(data)
        self.step, self.tokens = notes.step, notes.tokens
        self.began_at = notes.step
        self._saved_step = self._written_step = notes.step
        self.check_folder()
        with self._ranks.together():
            self.metrics.cut(notes.step)
            self._host.go_on_reporting(lambda place, read: continue_files(Path(place), read, self._folder.path))
        if self._ranks.from_first(lambda: self.metrics.is_evaluated(notes.step)):
            self._evaluated_step = notes.step

    def train(self) -> str | None:
        """Train up to the last step, write the last checkpoint, evaluate.

        Returns:
            None at the end; the reason, such as "SIGTERM", where a request to stop came first. There is a
            checkpoint either way; where the last one could not be written after a request, an older one or none.

        Raises:
            UserError: a guard stops the run, its folder is gone, or its last checkpoint could not be written.
        """
        settings = self._settings
        reason: str | None = None
        saved_at = time.monotonic()
        self._host.optimizer.measure_exchange(self.meter.stopwatch)
        with StopRequest(self._tell_stop) as request, self._profile:
            self._screen.start_bar(self.step, settings.steps)
            if self.step and self._evaluation_is_due():  # the run was stopped before it had made it
                reason = self.evaluate(request, settings.evaluations)
            while self.step < settings.steps and reason is None:
                self._train_step()
                if self._host.optimizer.updates and self._ranks.is_first:
                    self._folder.drop_old_run()
                reason, save = self._what_next(request, time.monotonic() - saved_at)
                if save:
                    self.save()
                    saved_at = time.monotonic()
                if reason is None and self._evaluation_is_due():
                    reason = self.evaluate(request, settings.evaluations)
            self.save()
            failed = self._failed_save()
            if failed is not None and reason is None:
                raise AgreedError(str(failed)) from failed
            if failed is not None:
                self._screen.say(str(failed))
            if self._ranks.is_first:
                self._folder.drop_old_run()  # also where every update was skipped
            if reason is None and (self.last_evaluation is None or self._scored_step != self.step):
                reason = self.evaluate(request)
            self._screen.end_bar()
        return reason

    def evaluate(self, request: StopRequest | None = None, schedule: Schedule | None = None) -> str | None:
        """Score the held-out text, and note it everywhere.

        Args:
            request: what may have the evaluation given up.
            schedule: says what to read; None: the whole text.

        Returns:
            Why it was given up, if it was.
        """
        reason: str | None = None
        is_sample = schedule is not None and schedule.is_sample

        def give_up() -> bool:
            nonlocal reason
            reason = None if request is None else self._what_next(request, 0.0)[0]
            return reason is not None

        examples = self._held_out if schedule is None else schedule.examples
        if schedule is None:
            which = f"model after {self.step:,} steps" if self.step else "untrained model"
            self._screen.say(f"scoring the {which} on {examples.tokens:,} tokens")
        self._evaluates = True
        found = evaluate(
            self.engine, examples, micro_batch_size=self._settings.batch.micro, ranks=self._ranks, give_up=give_up
        )
        self._evaluates = False
        if found is None:
            return reason
        self._evaluated_step = self.step
        if not is_sample:
            self.last_evaluation, self._scored_step = found, self.step
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "epoch": self.epoch,
            "eval_loss": found.loss,
            "eval_perplexity": found.perplexity,
            "eval_tokens": found.tokens,
        }
        text = f"step {self.step:,}: held-out perplexity {found.perplexity:,.2f}"
        if is_sample:
            row["eval_is_sample"] = True
            text += f" (of a sample of {found.tokens:,} tokens)"
        if self._settings.galore_compatible_eval:
            row["eval_perplexity_galore_compatible"] = found.galore_compatible
            text += f" (as published code computes it: {found.galore_compatible:,.2f})"
        self.check_folder()
        self.metrics.append(row)
        self._screen.say(text)
        self._host.report(monitor_numbers(row))
        return None

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one; the one before may have failed."""
        if self._saved_step == self.step:
            return
        self.check_folder()
        failed = self._failed_save()
        if failed is None and self._written_step is not None and not self._folder.checkpoints.exists():
            self._screen.say(f"{self._folder.checkpoints} was moved or deleted, with what was saved: it is made anew")
        if failed is not None:
            self._screen.say(f"{failed}\nThe training goes on, and tries again with step {self.step:,}")
        notes = Notes(f"step{self.step}", self.step, self.tokens, self._required, self._noted)
        text = {HELD_OUT: self._held_out.fingerprint, TOKENIZER: self._tokenizer}
        data = {**self._batches.state_dict(), **text}
        save_checkpoint(self.engine, self._folder, notes, data, keep=self._settings.keep)
        self._saved_step = self.step

    def check_folder(self) -> None:
        """Make sure that the folder is where it was, before anything is written there, lest it be made anew.

        Raises:
            UserError: it was moved or deleted; on all ranks.
        """
        try:
            self._ranks.from_first(self._lock.check)
        except AgreedError:
            self._screen.end_bar()
            self._failed_save()  # has said so itself
            raise

    @property
    def epoch(self) -> float:
        """How many times the training text has been read."""
        return round(self._batches.epoch, 6)

    @property
    def parameters(self) -> int:
        """How many the model has, over all ranks."""
        frozen = (p for p in self.engine.module.parameters() if not p.requires_grad)
        return self.trained_parameters + sum(math.prod(logical_shape(parameter)) for parameter in frozen)

    @property
    def trained_parameters(self) -> int:
        """How many of them are not frozen."""
        layout = self._host.optimizer.prepare().layout
        return sum(map(layout.numel, layout.shapes))

    def _check_held_out(self, data: dict[str, Any]) -> None:
        """Refuse a run that was evaluated on another text; older checkpoints do not say."""
        if data.get(HELD_OUT, self._held_out.fingerprint) != self._held_out.fingerprint:
            raise UserError(
                "the run was evaluated on another held-out text, and its curve would mix the two. Resume with the "
                "--eval-dataset, --max-eval-tokens and --test-half it was started with; `megalr evaluate` scores a "
                "run on any text"
            )

    def _what_next(self, request: StopRequest, unsaved: float) -> tuple[str | None, bool]:
        """Why to stop, if any rank was asked to, and whether a checkpoint is due; the same on all ranks.

        Args:
            request: this rank's.
            unsaved: seconds since the last checkpoint.
        """
        mine = request.reason
        due = self._ranks.is_first and self._settings.save_every.is_over(self.step, unsaved)
        asked, save = self._ranks.sum([mine is not None, due])
        reason = agreed_reason(self._ranks.gather(mine)) if asked else None
        if reason is not None:
            self._tell_stop(reason)  # of another rank
        return reason, bool(save)

    def _tell_stop(self, reason: str) -> None:
        """Say once what a request to stop brings about."""
        if self._stop_is_told:
            return
        self._stop_is_told = True
        words = "giving up this evaluation" if self._evaluates else "stopping after this update"
        again = " (Ctrl-C again ends it at once, and saves nothing)" if reason == "SIGINT" else ""
        self._screen.say_at_once(f"{words}, and saving{again}")

    def _evaluation_is_due(self) -> bool:
        return self.step % self._settings.evaluations.every == 0 and self._evaluated_step != self.step

    def _failed_save(self) -> UserError | None:
        """Wait for the checkpoint under way; why it could not be written, on all ranks alike."""
        try:
            megalr.wait_for_checkpoint()
        except UserError as error:
            return error
        self._written_step = self._saved_step
        return None

    def _train_step(self) -> None:
        """One update."""
        engine, ranks, batch = self.engine, self._ranks, self._settings.batch
        measure = self.meter.stopwatch.measure
        lr, rates = self._host.learning_rate(), self._host.optimizer.learning_rates()
        with self.meter.update():
            micro_batches = [next(self._batches) for _ in range(batch.accumulation)]
            read = sum(int((b["labels"] != IGNORED).sum()) for b in micro_batches)
            predicted, read_by_all = map(round, ranks.sum_of_data([sum(map(predicted_tokens, micro_batches)), read]))
            # DeepSpeed averages over micro-batches and ranks. Dividing by the average count makes that the
            # mean over the tokens of the whole batch, however it is cut and however unevenly it is padded.
            # Where there are none at all, the losses are sums over nothing, 0, and not 0 / 0.
            share = predicted / (batch.accumulation * ranks.data_size) if predicted else 1.0
            if not predicted:
                engine.megalr_guard.skip(NOTHING_TO_PREDICT)
            losses: list[Tensor] = []
            stopped: GuardError | None = None
            for micro_batch in micro_batches:
                with measure("forward"):
                    loss = engine(**to_device(micro_batch, ranks.device), num_items_in_batch=share).loss
                with measure("backward"):
                    engine.backward(loss)
                losses.append(loss.detach().double())
                try:
                    with measure("optimizer"):
                        engine.step()
                except GuardError as error:  # at the last micro-batch of all ranks; the step is noted all the same
                    stopped = error
            total, gone = ranks.sum_of_data([float(sum(losses)), not self._lock.is_in_place])
        if gone:
            self.check_folder()
        self.step += 1
        self.tokens += read_by_all
        self.meter.tokens += read_by_all
        self._profile.update_is_made()
        self._note_step(total / (batch.accumulation * ranks.data_size) if predicted else None, lr, rates)
        if stopped is not None:
            self._screen.end_bar()
            failed = self._failed_save()
            words = [f"step {self.step}: {stopped}", *([str(failed)] if failed else []), self._last_checkpoint()]
            raise AgreedError("\n".join(words)) from stopped

    def _note_step(self, loss: float | None, lr: float, rates: dict[str, float]) -> None:
        speed = self.meter.tokens_per_second
        self._screen.advance(loss=loss, tokens_per_second=speed, lr=lr)
        events = list(self._host.optimizer.last_events)
        before, self._bytes_moved = self._bytes_moved, self._host.optimizer.bytes_moved
        if self.step % self._settings.log_every == 0 or events:
            row: dict[str, Any] = {
                "step": self.step,
                "tokens": self.tokens,
                "epoch": self.epoch,
                "loss": loss,
                "lr": lr,
                "learning_rates": rates,
                "tokens_per_second": round(speed, 1),
                **self.meter.row(),
                "grad_norm": self._host.gradient_norm(),
                "exchange_bytes": self._bytes_moved - before,  # of this update, sent by all ranks together
            }
            if events:
                row["events"] = events
            if events == ["skipped"]:
                row["skipped"] = self.engine.megalr_guard.last_reason
                self._screen.say(f"step {self.step:,}: the update is skipped: {row['skipped']}")
            self.metrics.append(row)
            self._host.report(monitor_numbers(row))

    def _last_checkpoint(self) -> str:
        if self._written_step is None:
            return "no checkpoint has been written (--save-every)"
        return f"the last checkpoint is that of step {self._written_step}, in {self._folder.checkpoints}"
