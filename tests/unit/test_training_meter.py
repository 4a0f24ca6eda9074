"""Speeds, times, memory, peaks of devices, and their names in monitors."""

import time

import pytest
import torch

from megalr.timing import Stopwatch, span
from megalr.train.meter import PARTS, Meter, Work
from megalr.train.monitors import NAMES, monitor_numbers
from megalr.train.peaks import PEAKS, peak_of_device, peak_tflops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only a test moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


def update(meter, clock, tokens, **parts):
    with meter.update():
        for name, seconds in parts.items():
            with meter.stopwatch.measure(name):
                clock(seconds)
        clock(1)
    meter.tokens += tokens


def test_a_row_is_about_the_updates_since_the_last_one(clock):
    meter = Meter(Work(flops=6 * 10**12, peak_tflops=4.0, ranks=2), CPU)
    update(meter, clock, 100, forward=1, backward=2, optimizer=4, exchange=0)  # 8 s
    first = meter.row()
    assert first["tokens_per_second_per_rank"] == pytest.approx(100 / 8 / 2)
    assert first["tflops_per_rank"] == pytest.approx(6 / 8 / 2)
    assert first["mfu"] == pytest.approx(6 / 8 / 2 / 4)
    assert first["seconds"] == {"forward": 1, "backward": 2, "optimizer": 4, "exchange": 0, "total": 8}
    update(meter, clock, 100, forward=1)  # 2 s
    update(meter, clock, 200, forward=2, exchange=1)  # 4 s
    second = meter.row()
    assert second["tokens_per_second_per_rank"] == pytest.approx(300 / 6 / 2)
    assert second["tflops_per_rank"] == pytest.approx(2 * 6 / 6 / 2)
    assert second["seconds"] == {"forward": 1.5, "backward": 0, "optimizer": 0, "exchange": 0.5, "total": 3}
    summary = meter.summary()
    assert meter.tokens_per_second == pytest.approx(400 / 14)
    assert summary["tokens_per_second_per_rank"] == pytest.approx(200 / 14)
    assert summary["tflops_per_rank"] == pytest.approx(3 * 6 / 14 / 2)
    assert summary["seconds_per_update"]["forward"] == pytest.approx(4 / 3)
    assert list(summary["seconds_per_update"]) == [*PARTS, "total"]


def test_what_a_checkpoint_sends_is_in_no_update(clock):
    meter = Meter(Work(flops=None, peak_tflops=None, ranks=1), CPU)
    with meter.stopwatch.measure("exchange"):
        clock(5)
    update(meter, clock, 1, exchange=1)
    assert meter.row()["seconds"]["exchange"] == 1


@pytest.mark.parametrize(("flops", "peak"), [(None, None), (None, 2.0), (10**12, None)])
def test_what_is_unknown_is_null(clock, flops, peak):
    meter = Meter(Work(flops=flops, peak_tflops=peak, ranks=1), CPU)
    update(meter, clock, 1)
    row = meter.row()
    assert (row["tflops_per_rank"] is None) == (flops is None)
    assert row["mfu"] is None and meter.summary()["mfu"] is None


def test_memory_grows_with_what_is_held():
    meter = Meter(Work(flops=None, peak_tflops=None, ranks=1), CPU)
    before = meter.row()["memory_bytes"]
    held = torch.ones(50_000_000)
    row = meter.row()
    assert row["memory_bytes"] - before > 150_000_000 and len(held)
    assert row["peak_memory_bytes"] >= row["memory_bytes"] * 0.99


def test_on_a_gpu_nothing_waits_until_the_times_are_read(monkeypatch):
    asked = []

    class Event:
        made = 0

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self):
            asked.append(f"record {self.number}")

        def elapsed_time(self, other):
            asked.append("read")
            return 250.0 * (other.number - self.number)

        def synchronize(self):
            raise AssertionError("waits")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda", 0))
    for _ in range(2):
        with stopwatch.measure("forward"):
            pass
    assert asked == ["record 1", "record 2", "record 3", "record 4"]
    assert stopwatch.take() == {"forward": 0.5}
    assert stopwatch.take() == {}


def test_a_span_costs_little_without_a_profiler():
    start = time.process_time()
    for _ in range(1000):
        with span("forward"):
            pass
    assert time.process_time() - start < 0.02


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("A100-SXM4-40GB", 312.0, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H200 NVL", 835.5, 60.0),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA L40S", 362.05, 91.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14.0),
        ("AMD Instinct MI250X", 191.5, 47.9),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_peaks_of_known_devices(name, bf16, fp32):
    assert peak_tflops(name, torch.bfloat16) == bf16
    assert peak_tflops(name, torch.float32) == fp32
    assert peak_tflops(name, torch.float64) is None


def test_precisions_of_a_device():
    assert peak_tflops("NVIDIA A100-SXM4-80GB", torch.float32, precision="high") == 156.0
    assert peak_tflops("Tesla V100-SXM2-16GB", torch.float32, precision="high") == 15.7
    assert peak_tflops("Tesla V100-SXM2-16GB", torch.float16) == 125.0
    assert peak_of_device(CPU, torch.float32) is None
    for _, peak in PEAKS:
        assert all(peak.fp16 >= number for number in (peak.bf16, peak.tf32, peak.fp32) if number is not None)


def test_monitors_get_the_numbers_of_a_row_by_one_table(clock):
    meter = Meter(Work(flops=10**12, peak_tflops=None, ranks=1), CPU)
    update(meter, clock, 8, forward=1)
    row = {"step": 1, "loss": 2.0, "grad_norm": None, "learning_rates": {"norm": 0.1, "factors": 0.2}, **meter.row()}
    found = monitor_numbers({**row, "events": ["merge"], "lr": 0.2})
    assert found["Train/Samples/train_loss"] == 2.0 and found["Train/Samples/lr"] == 0.2
    assert found["Train/Samples/lr_norm"] == 0.1 and found["Train/Samples/lr_factors"] == 0.2
    assert found["Train/Samples/seconds_forward"] == 1 and found["Train/Samples/seconds_total"] == 2
    assert found["Train/Samples/tflops_per_rank"] == 0.5
    absent = {"Train/Samples/grad_norm", "Train/Samples/mfu"}
    assert not absent & found.keys() and all(isinstance(number, int | float) for number in found.values())


def test_an_evaluation_reports_its_score_alone():
    row = {"step": 5, "tokens": 9, "epoch": 0.5, "eval_loss": 1.0, "eval_perplexity": 2.7, "eval_tokens": 30}
    assert monitor_numbers(row) == {"Eval/Samples/loss": 1.0, "Eval/Samples/perplexity": 2.7}
    assert len(set(NAMES.values())) == len(NAMES)
