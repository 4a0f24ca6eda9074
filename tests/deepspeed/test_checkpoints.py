"""Checkpoints that move between layouts: what is read is what was written, and training goes on as it would have."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from megalr.checkpoint.manifest import read_manifest
from megalr.checkpoint.reading import read_tensor
from megalr.checkpoint.saving import write_entries
from megalr.layout.rectangles import Entry
from tests.covering import in_turn
from tests.deepspeed.checkpointing import BEFORE, METHODS
from tests.deepspeed.test_rules import assert_same_weights

pytestmark = pytest.mark.distributed
MODULE = "tests.deepspeed.checkpointing"
# ZeRO stage, processes, of which so many share each layer.
LAYOUTS = [(s, w, t) for s in range(4) for w in (1, 2, 3, 4) for t in (1, 2) if w % t == 0]
SOURCES = [(0, 1, 1), (3, 3, 1), (1, 4, 2), (2, 2, 1)]
MOVED = ["low-rank", "projected", "GaLore", "Fira", "Muon"]
ALONE = ["SLTrain", "ReLoRA", "SwitchLoRA", "VeLoRA", "Q-GaLore"]  # these not all under tensor parallelism
# Eight bits of a moment or a basis turn over where a sum in another order lies on the other side of a half.
TOLERANCE = {"Q-GaLore": 1e-2}
STAGES = [(0, 2), (1, 2), (2, 3), (3, 2)]  # and processes


# Each method, and every source, stage, number of processes and of tensor-parallel ranks; each stage to another.
DAILY = [
    ("low-rank", (0, 1, 1), (1, 3, 1)),
    ("low-rank", (1, 4, 2), (3, 2, 1)),
    ("projected", (3, 3, 1), (0, 4, 2)),
    ("GaLore", (2, 2, 1), (3, 2, 2)),
    ("Fira", (3, 3, 1), (2, 2, 1)),
    ("Muon", (0, 1, 1), (1, 2, 2)),
]
MOVES = [
    *DAILY,
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in itertools.product(MOVED, SOURCES, LAYOUTS)
        if row not in DAILY
    ),
]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Saves a method at a layout once: the folder, and the weights at the end of the run that went on."""
    done = {}

    def of(method, layout, **changes):
        key = method, layout, str(changes)
        if key not in done:
            stage, world, tensor = layout
            folder = str(tmp_path_factory.mktemp("check points"))
            done[key] = folder, ranks(world).run(f"{MODULE}:save", method, tensor, stage, folder, **changes)[0]
        return done[key]

    return of


@pytest.mark.parametrize(("method", "source", "target"), MOVES)
def test_moves_to_another_layout(ranks, saved, method, source, target, tmp_path):
    check_move(ranks, saved, method, source, target, tmp_path)


PAIRS = [((0, 1, 1), (3, 3, 1)), ((3, 2, 1), (1, 3, 1)), ((2, 3, 1), (0, 2, 1))]
OTHERS = [
    pytest.param(method, *pair, marks=[] if i % len(PAIRS) == j else [pytest.mark.slow])
    for i, method in enumerate(ALONE)
    for j, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize(("method", "source", "target"), OTHERS)
def test_other_methods_move(ranks, saved, method, source, target, tmp_path):
    check_move(ranks, saved, method, source, target, tmp_path)


@pytest.mark.parametrize(
    ("source", "target"),
    [((0, 2, 2), (3, 2, 1)), ((2, 3, 1), (3, 4, 2)), pytest.param((1, 2, 2), (0, 4, 2), marks=pytest.mark.slow)],
)
def test_sparse_values_move_between_tensor_parallel_sizes(ranks, saved, source, target, tmp_path):
    check_move(ranks, saved, "SLTrain", source, target, tmp_path)


@pytest.mark.parametrize(("source", "target"), [((0, 2, 2), (3, 2, 1)), ((3, 3, 1), (1, 4, 2))])
def test_frozen_weights_move_between_tensor_parallel_sizes(ranks, saved, source, target, tmp_path):
    """Of layers that are cut by rows and by columns, and of one that is not cut."""
    frozen = ("embed_tokens", "0.self_attn.q_proj", "1.self_attn.o_proj")
    check_move(ranks, saved, "GaLore", source, target, tmp_path, frozen=frozen)


@pytest.mark.parametrize(
    ("source", "target"),
    [((1, 2, 1), (3, 3, 1)), pytest.param((0, 2, 1), (2, 1, 1), marks=pytest.mark.slow), ((3, 2, 1), (0, 2, 1))],
)
def test_moves_in_bf16(ranks, saved, source, target, tmp_path):
    """Masters, moments and bases are the same bits; training in bf16 is not exactly so at another layout."""
    check_move(ranks, saved, "low-rank", source, target, tmp_path, 5e-2, bf16={"enabled": True})


def test_random_states_are_those_of_who_reads_the_same_data(ranks, tmp_path):
    first, second = ranks(2).run(f"{MODULE}:drawn", 1, str(tmp_path), save=True)
    assert first != second
    assert ranks(2).run(f"{MODULE}:drawn", 1, str(tmp_path), save=False) == [first, second]
    assert ranks(2).run(f"{MODULE}:drawn", 2, str(tmp_path), save=False) == [first, first]
    assert ranks(4).run(f"{MODULE}:drawn", 2, str(tmp_path), save=False) == [first, first, second, second]
    assert ranks(1).run(f"{MODULE}:drawn", 1, str(tmp_path), save=False) == [first]
    (_, drawn_without), *_ = ranks(3).run(f"{MODULE}:drawn", 1, str(tmp_path), save=False)[2:]
    torch.manual_seed(7)
    assert drawn_without == int(torch.randint(1 << 30, ()))  # one that the checkpoint has none for goes on with its own


@pytest.mark.parametrize("target", [pytest.param((0, 2, 1), marks=pytest.mark.slow), (2, 3, 1), (3, 2, 1)])
def test_what_rounding_has_cut_off_is_back_in_fp32(ranks, saved, target, tmp_path):
    folder, _ = saved("ReLoRA", (1, 2, 1), bf16={"enabled": True})
    stage, world, tensor = target
    ranks(world).run(f"{MODULE}:load", "ReLoRA", tensor, stage, folder, str(tmp_path))
    first, second = (read_manifest(Path(where) / f"step{BEFORE}") for where in (folder, tmp_path))
    names = [key.partition("/")[2] for key in first.tensors if key.startswith("remainders/")]
    assert len(names) == 6  # noqa: PLR2004  (layers of two blocks)
    for name in names:
        weight, remainder = (read_tensor(first, key) for key in (f"frozen/{name}.weight", f"remainders/{name}"))
        assert remainder.norm() > 0
        assert torch.equal(read_tensor(second, f"frozen/{name}.weight"), weight.float() + remainder.float())
    assert not [key for key in second.tensors if key.startswith("remainders/")]
    for key in first.tensors:
        if key.split("/")[0] in ("weights", "exp_avg", "exp_avg_sq"):
            assert torch.equal(read_tensor(first, key), read_tensor(second, key))


@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_moves_to_another_gradient_accumulation(ranks, saved, before, after, tmp_path):
    check_move(ranks, saved, "low-rank", (1, 2, 1), (2, 1, 1), tmp_path, accumulations=(before, after))


def check_move(ranks, saved, method, source, target, tmp_path, tolerance=1e-5, accumulations=(1, 1), **changes):
    before, after = accumulations
    folder, expected = saved(method, source, accumulation=before, **changes)
    stage, world, tensor = target
    copy, changes = tmp_path / "written again", {**changes, "accumulation": after}
    got, dropped = ranks(world).run(f"{MODULE}:load", method, tensor, stage, folder, str(copy), **changes)[0]
    assert dropped == ""
    first, second = (read_manifest(Path(where) / f"step{BEFORE}") for where in (folder, copy))
    keys = [key for key in first.tensors if not key.startswith("random/")]  # one for each process
    assert sorted(keys) == sorted(key for key in second.tensors if not key.startswith("random/"))
    assert [key for key in keys if not torch.equal(read_tensor(first, key), read_tensor(second, key))] == []
    numbers = [{k: v for k, v in m.content["numbers"].items() if k != "chosen_by"} for m in (first, second)]
    assert numbers[0] == numbers[1]
    assert_same_weights(got, expected, 1e-30 if source == target else max(tolerance, TOLERANCE.get(method, 0)))


# Each stage once; tests/world has every method go on from a save, and here each one moves to another layout.
ONCE = ["low-rank", "projected", "GaLore", "SwitchLoRA"]
SAME = [
    pytest.param(method, stage, world, marks=[] if ONCE[stage] == method else [pytest.mark.slow])
    for method in METHODS
    for stage, world in STAGES
]


@pytest.mark.parametrize(("method", "stage", "world"), SAME)
def test_at_the_same_layout_every_bit_is_the_same(ranks, method, stage, world, tmp_path):
    assert ranks(world).run(f"{MODULE}:lost", method, 1, stage, str(tmp_path)) == [[]] * world


@pytest.mark.parametrize(("stage", "world"), [pytest.param(0, 1, marks=pytest.mark.slow), (2, 2), (3, 3)])
def test_with_another_rule_weights_stay_and_moments_begin_anew(ranks, saved, stage, world):
    folder, _ = saved("GaLore", (0, 1, 1))
    for dropped, left, weights in ranks(world).run(f"{MODULE}:load_other", "Muon", stage, folder):
        assert dropped.startswith("moments and states of rule galore")
        counts = {"factors": 0, "dense": 0}
        assert left == {"updates": BEFORE, "steps": BEFORE, "counts": counts, "states": 0, "moments": 0}
        manifest = read_manifest(Path(folder) / f"step{BEFORE}")
        for name, weight in (weights or {}).items():
            assert torch.equal(weight.view(-1), read_tensor(manifest, f"weights/{name}").view(-1))


STORED = [
    ("GaLore", "Q-GaLore", {}, 0.1),  # half a level of a basis's 15 is the most
    ("Q-GaLore", "GaLore", {}, 1e-30),
    ("Q-GaLore", "Q-GaLore", {"min_8bit_size": 10**6, "queue_size": 3}, 1e-30),
]


@pytest.mark.parametrize(("source", "target", "changes", "tolerance", "layout"), in_turn(STORED, [(3, 3), (1, 2)]))
def test_a_rules_states_go_on_in_another_dtype(ranks, saved, source, target, changes, tolerance, layout):
    folder, _ = saved(source, (0, 1, 1))
    stage, world = layout
    errors = {}
    for dropped, of_rank in ranks(world).run(f"{MODULE}:load_stored", target, stage, folder, changes):
        assert dropped == ""
        errors |= of_rank
    assert errors.keys() == read_manifest(Path(folder) / f"step{BEFORE}").content["numbers"]["matrices"].keys()
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("GaLore", "low-rank", "another model or parametrization (checkpoint -> now):\n  weights/model.layers.0"),
        ("projected", "GaLore", "load it with the model and the megalr.parametrization that it was written with"),
        ("VeLoRA", "Muon", "the checkpoint was written with rule adamw, activations"),
    ],
)
def test_what_cannot_go_on_is_refused_and_changes_nothing(ranks, saved, source, target, words):
    folder, _ = saved(source, (0, 1, 1))
    for message, unchanged in ranks(2).run(f"{MODULE}:refused", target, 1, 2, folder):
        assert words in message
        assert unchanged


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_of_another_shape_is_refused_and_changes_nothing(ranks, saved, tmp_path):
    """By both processes, of which one has no part in the matrix."""
    shutil.copytree(saved("GaLore", (0, 1, 1))[0], tmp_path / "copy")
    manifest = read_manifest(tmp_path / "copy" / f"step{BEFORE}")
    tensors = {key: read_tensor(manifest, key) for key in manifest.tensors}
    key = next(key for key, each in tensors.items() if key.startswith("rule/") and each.ndim > 1)
    rows, columns = tensors[key].shape
    entries = {name: Entry.of(each.view(1, -1) if name == key else each) for name, each in tensors.items()}
    rest = {name: each for name, each in manifest.content.items() if name not in ("files", "tensors")}
    shutil.rmtree(manifest.folder)
    write_entries(
        tmp_path / "copy",
        manifest.folder.name,
        rest,
        entries,
        manifest.content["numbers"]["matrices"],
        keep=None,
        asynchronous=False,
    )
    for message, unchanged in ranks(2).run(f"{MODULE}:refused", "GaLore", 1, 2, str(tmp_path / "copy")):
        assert f"{key}: (1, {rows * columns}), expected ({rows}, {columns})" in message
        assert unchanged


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_replaced_while_it_is_loaded_is_refused_by_all(ranks, saved, tmp_path, stage):
    """One process finds another save in its place, and neither has the numbers of one and the weights of the other."""
    shutil.copytree(saved("low-rank", (2, 2, 1))[0], tmp_path / "copy")
    for messages in ranks(2).run(f"{MODULE}:replaced", stage, str(tmp_path / "copy")):
        assert "process 1: " in messages[0]
        assert "was replaced by another save while it was read: run again" in messages[0]
        assert messages[1] == f"{BEFORE} updates"
