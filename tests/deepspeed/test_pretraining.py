"""The pretraining program on several processes: the same run however it is cut, and after a resume."""

import csv
import gzip
import itertools
import json
import math
import re
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalr.train.monitors import monitor_numbers
from tests.end_to_end.commands import assert_same_checkpoints, losses, metrics, small_run, timeless, write_config

pytestmark = pytest.mark.distributed
TRAIN = "tests.deepspeed.pretraining:train"
STEPS = 12
# Both events come within the run.
EVENTS = {
    "refactorization": {"interval": 5},
    "momentum_reset": {"interval": 4, "scope": "factors", "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def train(ranks, tmp_path_factory):
    """Trains at a stage and world size, once, and gives the run's folder."""
    folder = tmp_path_factory.mktemp("runs")
    done = {}

    def once(stage, world_size, *flags, **sections):
        key = (stage, world_size, flags, str(sections))
        if key not in done:
            name = f"run{len(done)}"
            config = write_config(folder / f"{name}.json", stage, megalr=EVENTS, **sections)
            command = ["--deepspeed", str(config), *small_run(folder), "--steps", str(STEPS), "--save-every", "6"]
            ranks(world_size).run(TRAIN, [*command, "--output", name, *flags], str(folder))
            done[key] = folder / name
        return done[key]

    return once


def check_same(one, other, rel):
    assert losses(one) == pytest.approx(losses(other), rel=rel)
    ends = [[row["eval_loss"] for row in metrics(folder) if "eval_loss" in row] for folder in (one, other)]
    assert ends[0] == pytest.approx(ends[1], rel=rel)


def test_events_are_noted(train):
    events = {row["step"]: row["events"] for row in metrics(train(0, 1)) if "events" in row}
    assert events == {
        4: ["momentum_reset"],
        5: ["refactorization"],
        8: ["momentum_reset"],
        10: ["refactorization"],
        12: ["momentum_reset"],
    }


def test_rows_have_speeds_times_and_rates(train):
    rows = [row for row in metrics(train(3, 2)) if "loss" in row]
    sent = [row["step"] for row in rows if row["exchange_bytes"]]
    assert sent == [5, 10] == [row["step"] for row in rows if row["seconds"]["exchange"]]  # refactorizations
    for row in rows:
        parts, total = dict(row["seconds"]), row["seconds"]["total"]
        assert all(seconds > 0 for name, seconds in parts.items() if name != "exchange")
        assert parts["exchange"] <= parts["optimizer"]
        assert parts["forward"] + parts["backward"] + parts["optimizer"] <= 1.001 * total
        assert row["tokens_per_second_per_rank"] == pytest.approx(12 * 32 / total / 2, rel=1e-3)
        assert row["mfu"] is None and 0 < row["memory_bytes"] <= 1.01 * row["peak_memory_bytes"]
        assert set(row["learning_rates"]) == {"factors", "embedding", "norm"}
    # Three updates after each reset the factors have the whole rate again; the first of them has a thousandth.
    shares = [row["learning_rates"]["factors"] / row["lr"] for row in rows]
    assert shares[:8] == pytest.approx([1, 1, 1, 1, 0.001, 0.5005, 1, 1])
    assert all(row["learning_rates"]["norm"] == row["lr"] for row in rows)


def test_operations_do_not_depend_on_how_a_run_is_cut(train):
    runs = [train(0, 1), train(2, 2), train(3, 3), train(3, 2, "--activation-checkpointing")]
    runs.append(train(2, 3, gradient_accumulation_steps=2))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in runs]
    assert len({summary["flops_per_update"] for summary in summaries}) == 1
    one = summaries[1]
    speed = one["flops_per_update"] / one["seconds_per_update"]["total"] / 2 / 1e12
    assert one["tflops_per_rank"] == pytest.approx(speed)


def test_a_profile_and_a_peak(train):
    folder = train(3, 2, "--profile", "3", "--peak-tflops", "0.5")
    with gzip.open(folder / "profile/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    found = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [found.count(name) for name in ("forward", "backward", "optimizer")] == [3, 3, 3]
    assert [found.count(name) for name in ("momentum_reset", "refactorization")] == [1, 1] and "exchange" in found
    for row in metrics(folder)[1:5]:
        assert row["mfu"] == pytest.approx(row["tflops_per_rank"] / 0.5, rel=1e-4)
    check_same(folder, train(0, 1), rel=1e-5)


def test_no_update_is_idle(train):
    rates = [row["lr"] for row in metrics(train(0, 1)) if "lr" in row]
    assert rates[0] == pytest.approx(max(rates))  # the warm-up of 12 steps is one step long
    assert min(rates) > 0


def daily(rows, *axes):
    """The product of some axes, of which some rows are for every day."""
    return [pytest.param(*row, marks=[] if row in rows else [pytest.mark.slow]) for row in itertools.product(*axes)]


@pytest.mark.parametrize(
    ("stage", "world_size"), daily([(0, 2), (1, 2), (1, 3), (2, 2), (3, 1), (3, 3)], (0, 1, 2, 3), (1, 2, 3))
)
def test_every_stage_and_world_size_trains_the_same_model(train, stage, world_size):
    check_same(train(stage, world_size), train(0, 1), rel=1e-5)


@pytest.mark.parametrize("world_size", daily([(3,)], (1, 2, 3)))
def test_accumulation_changes_nothing(train, world_size):
    check_same(train(2, world_size, gradient_accumulation_steps=2), train(0, 1), rel=1e-5)


def test_activation_checkpointing_changes_nothing(train):
    check_same(train(3, 2, "--activation-checkpointing"), train(0, 1), rel=1e-5)


@pytest.mark.parametrize("stage", daily([(0,), (3,)], (0, 1, 2, 3)))
def test_bf16_stays_close(train, stage):
    check_same(train(stage, 2, bf16={"enabled": True}), train(0, 1), rel=2e-3)


def test_uneven_padding_changes_nothing(train, tmp_path):
    """Documents of one to fifty words, one a sequence: every token weighs the same, however the batch is cut."""
    text = tmp_path / "documents.jsonl"
    lines = [" ".join(f"word{i * k % 17}" for k in range(1 + i * i % 50)) for i in range(300)]
    text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    flags = ["--no-pack", "--dataset", str(text)]

    whole = train(0, 1, *flags)
    check_same(train(1, 2, *flags, train_micro_batch_size_per_gpu=1), whole, rel=1e-5)
    check_same(train(3, 3, *flags), whole, rel=1e-5)
    assert metrics(whole)[5]["tokens"] < 5 * 12 * 32


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        pytest.param(0, {}, marks=pytest.mark.slow),
        (1, {}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (3, {}),
        (0, {"bf16": {"enabled": True}}),
        pytest.param(2, {"bf16": {"enabled": True}}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bitwise(ranks, train, stage, sections):
    whole = train(stage, 2, **sections)
    resumed = whole.with_name(f"{whole.name}-resumed")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / f"checkpoints/step{STEPS}")
    (resumed / "checkpoints/latest").write_text("step6")
    (resumed / "summary.json").unlink()

    flags = ["--deepspeed", f"{whole}.json", *small_run(whole.parent), "--steps", str(STEPS), "--save-every", "6"]
    flags += ["--eval-every", "6"]  # as if it had been stopped before it made that one
    ranks(2).run(TRAIN, [*flags, "--output", str(resumed), "--resume"], str(whole.parent))

    assert (resumed / "summary.json").exists()
    first, again = (timeless(metrics(folder)) for folder in (whole, resumed))
    (made_up_for,) = [row for row in again if row not in first]
    assert made_up_for["step"] == 6
    assert math.isfinite(made_up_for["eval_loss"])
    assert [row for row in first if "eval_is_sample" not in row] == [row for row in again if row is not made_up_for]
    assert_same_checkpoints(resumed / f"checkpoints/step{STEPS}", whole / f"checkpoints/step{STEPS}")


MONITORS = {
    name: {"enabled": True, "output_path": "auto", "job_name": "auto"} for name in ("csv_monitor", "tensorboard")
}


def test_monitors_have_the_numbers_of_the_rows_before_and_after_a_resume(ranks, train):
    """The run is resumed from an older checkpoint than its last row, and its files are those of one run all the same.

    Learning rates differ from update to update, and not every update has a row.
    """
    folder = train(2, 1, "--log-every", "2", **MONITORS)
    batch = json.loads((folder / "run.json").read_text())["deepspeed"]["train_batch_size"]
    check_monitors(folder, batch)
    shutil.rmtree(folder / f"checkpoints/step{STEPS}")
    (folder / "checkpoints/latest").write_text("step6")
    (folder / "summary.json").unlink()
    foreign = folder / "csv_monitor/mine.csv"
    foreign.write_text("step,other\n1e9,1\nwords\n")
    with (folder / "csv_monitor/Train_Samples_train_loss.csv").open("a") as file:
        file.write("9")  # half a row

    flags = ["--deepspeed", f"{folder}.json", *small_run(folder.parent), "--steps", str(STEPS), "--save-every", "6"]
    flags += ["--log-every", "3"]  # no row of the second part is where one of the first was
    ranks(1).run(TRAIN, [*flags, "--output", str(folder), "--resume"], str(folder.parent))
    assert foreign.read_text() == "step,other\n1e9,1\nwords\n"
    foreign.unlink()
    check_monitors(folder, batch)


def check_monitors(folder, batch):
    """Every row of metrics.jsonl is in both monitors, and nothing else is; rows of events come besides --log-every."""
    expected = {}
    for row in metrics(folder):
        for name, value in monitor_numbers(row).items():
            expected.setdefault(name, []).append((row["step"] * batch, value))
    assert {"Train/Samples/lr", "Train/Samples/train_loss", "Eval/Samples/loss"} <= expected.keys()
    assert len({value for _, value in expected["Train/Samples/lr"]}) > 3
    files = {path.stem: list(csv.reader(path.open())) for path in (folder / "csv_monitor").glob("*.csv")}
    assert files.keys() == {name.replace("/", "_") for name in expected}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == expected.keys()
    for name, numbers in expected.items():
        header, *rows = files[name.replace("/", "_")]
        assert header == ["step", name.rpartition("/")[2]]
        assert [(float(x), float(value)) for x, value in rows] == numbers, name
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(x, pytest.approx(value, rel=1e-6)) for x, value in numbers], name


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ([], r"tokens of the training text: .* on rank 1 \(.*\), and .* on the others"),
        (["--steps", "9"], r"--steps: 9 on rank 1 \(.*\), and 4 on the others"),
    ],
)
def test_nodes_with_another_text_or_other_flags_are_named(ranks, tmp_path, other, line):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "text.txt").write_text(f"The text of node {folder.name}. " * 400)
    config = write_config(tmp_path / "ds.json")
    flags = ["--deepspeed", str(config), *small_run(tmp_path), "--dataset", "text.txt", "--steps", "4"]
    flags += ["--output", str(tmp_path / "run")]
    found = ranks(2).run("tests.deepspeed.pretraining:disagree", flags, [str(f) for f in folders], other)
    assert found[0] == found[1] and re.search(line, found[0]), found[0]
    if not other:
        assert f"the file {folders[1] / 'text.txt'}: " in found[0]
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("after_barrier", [False, True])
def test_a_mistake_of_one_rank_reaches_all(ranks, failing, after_barrier):
    found = ranks(3).run("tests.deepspeed.pretraining:fail_together", failing, after_barrier, timeout=60)
    assert found == [f"found by {failing}"] * 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_rank_0_decides_for_all(ranks, world_size):
    found = ranks(world_size).run("tests.deepspeed.pretraining:first_decides", timeout=60)
    everyone = list(range(world_size))
    assert found == [[{"rank": 0}, "no", [world_size, sum(everyone)], everyone]] * world_size
