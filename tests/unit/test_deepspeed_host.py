"""What DeepSpeed's host makes of an engine's answers, on engines that are nothing but these."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalr.hosts.choice import host_of
from megalr.hosts.deepspeed import DeepSpeedEngine
from megalr.hosts.deepspeed_monitors import leave_out, outlive_monitors
from megalr.hosts.deepspeed_pipeline import DeepSpeedPipeline

SCALE = {"cur_scale": 1024.0, "cur_iter": 7, "last_overflow_iter": 3}


def counting(micro_steps, *, told=None, managed=True):
    """An engine with four micro-batches an update."""
    return SimpleNamespace(
        basic_optimizer=None,
        micro_steps=micro_steps,
        gradient_accumulation_steps=lambda: 4,
        managed_gradient_accumulation=lambda: managed,
        _is_gradient_accumulation_boundary=told,
        is_gradient_accumulation_boundary=lambda: told if told is not None else (micro_steps + 1) % 4 == 0,
    )


@pytest.mark.parametrize(
    ("engine", "progress", "ends"),
    [
        (counting(8), (0, 4), False),
        (counting(9), (1, 4), False),
        (counting(11), (3, 4), True),
        (counting(9, told=True), (0, 4), True),
        (counting(11, told=False), (0, 4), False),
        (counting(9, managed=False), (0, 4), True),
    ],
)
def test_where_an_update_is(engine, progress, ends):
    host = host_of(engine)
    assert host.progress() == progress
    assert host.ends_update() is ends


def test_a_pipeline_is_told_by_its_engine():
    assert isinstance(host_of(SimpleNamespace(basic_optimizer=None, pipeline_parallelism=True)), DeepSpeedPipeline)
    assert type(host_of(SimpleNamespace(basic_optimizer=None, pipeline_parallelism=False))) is DeepSpeedEngine


def test_counters_put_the_next_micro_batch_at_the_start_of_an_update():
    engine = counting(9)
    host_of(engine).set_counters({"global_steps": 5, "global_samples": 80, "skipped_steps": 2})
    assert host_of(engine).counters() == {"global_steps": 5, "global_samples": 80, "skipped_steps": 2}
    assert engine.micro_steps == 20


def test_a_checkpoint_sets_counts_and_nothing_else():
    """What it says may be anybody's."""
    engine = SimpleNamespace(basic_optimizer=None, gradient_accumulation_steps=lambda: 2, module="the model")
    engine.optimizer = SimpleNamespace(loss_scaler=SimpleNamespace(cur_scale=1))
    host_of(engine).set_counters({"global_steps": 5, "module": 3, "gradient_accumulation_steps": 7})
    host_of(engine).set_loss_scale({"cur_scale": 2, "update_scale": 3})
    assert (engine.global_steps, engine.micro_steps, engine.module) == (5, 10, "the model")
    assert vars(engine.optimizer.loss_scaler) == {"cur_scale": 2}


@pytest.mark.parametrize(
    ("holder", "kept"),
    [
        ("loss_scaler", {**SCALE, "cur_hysteresis": 2}),  # ZeRO's wrappers
        ("loss_scale_config", SCALE),  # the wrapper of stage 0
    ],
)
def test_a_loss_scale_is_kept_wherever_the_wrapper_has_it(holder, kept):
    def engine(state):
        wrapper = SimpleNamespace(**{holder: SimpleNamespace(**state)})
        return SimpleNamespace(basic_optimizer=None, fp16_enabled=lambda: True, optimizer=wrapper)

    assert host_of(engine(kept)).loss_scale() == kept
    resumed = engine(dict.fromkeys(kept, 0))
    host_of(resumed).set_loss_scale(kept)
    assert vars(getattr(resumed.optimizer, holder)) == kept


def test_without_fp16_there_is_no_loss_scale():
    engine = SimpleNamespace(basic_optimizer=None, fp16_enabled=lambda: False, optimizer=torch.optim.SGD)
    assert host_of(engine).loss_scale() == {}
    host_of(engine).set_loss_scale({})


def test_rates_are_made_again_where_a_schedule_of_deepspeeds_stands():
    seen = []
    schedule = SimpleNamespace(last_batch_iteration=12, step=seen.append)
    host_of(SimpleNamespace(basic_optimizer=None, lr_scheduler=schedule)).refresh_rates()
    host_of(SimpleNamespace(basic_optimizer=None, lr_scheduler=SimpleNamespace(step=seen.append))).refresh_rates()
    host_of(SimpleNamespace(basic_optimizer=None, lr_scheduler=None)).refresh_rates()
    assert seen == [12]


class Recorder:
    def __init__(self, room):
        self.room, self.written = room, []

    def write_events(self, events):
        if not self.room:
            raise OSError(28, "No space left on device")
        self.written += events


def test_a_monitor_that_cannot_write_is_said_once_and_asked_again(caplog):
    full, other = Recorder(room=False), Recorder(room=True)
    monitors = SimpleNamespace(enabled=True, tb_monitor=full, wandb_monitor=None, csv_monitor=other)
    outlive_monitors(SimpleNamespace(monitor=monitors))
    for number in range(3):
        full.room = number == 2
        for monitor in (full, other):
            monitor.write_events([("loss", number, number)])
    assert full.written == [("loss", 2, 2)]
    assert other.written == [("loss", number, number) for number in range(3)]
    (record,) = caplog.records
    assert "Recorder cannot write: [Errno 28] No space left on device" in record.getMessage()


def test_numbers_that_are_left_out_come_from_the_host_alone():
    written = []
    engine = SimpleNamespace(global_samples=8, monitor=SimpleNamespace(write_events=written.extend))
    leave_out(engine.monitor, ["lr"])
    engine.monitor.write_events([("lr", 1.0, 8)])
    engine.monitor.write_events([("lr", 1.0, 8), ("scale", 2.0, 8)])
    DeepSpeedEngine(engine).report({"lr": 0.5})
    assert written == [("scale", 2.0, 8), ("lr", 0.5, 8)]
