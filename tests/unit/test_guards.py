"""The guards' arithmetic: which loss stands out, who differs, what is counted."""

import json
import math

import pytest
import torch

from megalr.config.guards import GuardsConfig
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.guards.losses import LEAST, LossWindow
from megalr.guards.replicas import Replica, compare_replicas, differing, find_replicas, hash_of, in_words


def window(losses, size=100, deviations=3.0):
    found = LossWindow(size, deviations)
    for loss in losses:
        found.accept(loss)
    return found


def test_a_section_is_read():
    section = {"max_skipped": 3, "spike_deviations": 6, "window": 50, "check_replicas_every": 10}
    config = MegalrConfig.from_json({"megalr": {"guards": section}})
    assert config.guards == GuardsConfig(max_skipped=3, spike_deviations=6.0, window=50, check_replicas_every=10)
    assert MegalrConfig.from_json({"megalr": {"guards": None}}).guards == GuardsConfig()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_skiped": 3}, 'megalr.guards has no key "max_skiped"; did you mean "max_skipped"'),
        ({"max_skipped": -1}, "max_skipped is -1; write at least 0"),
        ({"spike_deviations": 0}, "spike_deviations is 0.0; write a number above 0"),
        ({"spike_deviations": "6"}, "expected a number or null"),
        ({"window": 1}, "window is 1; write at least 2"),
        ({"check_replicas_every": -5}, "check_replicas_every is -5"),
        (7, "megalr.guards must be an object"),
    ],
)
def test_mistakes_in_the_section(section, message):
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json({"megalr": {"guards": section}})


def test_a_spike_stands_out_of_the_last_losses():
    known = window([3.0, 3.2] * 10)  # mean 3.1, standard deviation 0.1026
    assert known.objection(3.4) is None
    assert known.objection(-50.0) is None  # a low one is welcome
    assert known.objection(3.5) == "loss 3.5 is 3.9 deviations above the mean 3.1 of the last 20"


def test_too_few_losses_judge_nothing():
    assert window([3.0, 3.2] * (LEAST // 2 - 1)).objection(1e6) is None
    assert window([3.0, 3.2, 3.0], size=4).objection(1e6) is None
    assert window([3.0, 3.2, 3.0, 3.2], size=4).objection(1e6)


def test_no_deviations_no_judgement():
    assert window([3.0, 3.2] * 20, deviations=None).objection(1e6) is None


def test_of_losses_that_were_equal_one_stands_out_if_it_differs_by_more_than_rounding():
    assert window([3.0] * 30).objection(3.0) is None
    assert window([3.0] * 30).objection(3.0 + 2e-6) is None
    assert window([3.0] * 30).objection(4.0) is not None
    assert window([0.0] * 30).objection(0.0) is None
    assert window([0.0] * 30).objection(1.0) is not None


def test_old_losses_are_forgotten():
    known = window([100.0, 200.0] * 10 + [3.0, 3.2] * 10, size=20)
    assert known.objection(4.0)


def test_a_window_survives_json_exactly():
    known = window([math.pi / k for k in range(1, 40)], size=30)
    loaded = window([1.0], size=30)
    loaded.load(json.loads(json.dumps(known.state())))
    assert loaded.state() == known.state()
    assert loaded.objection(1e3) == known.objection(1e3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.uint8])
def test_a_hash_sees_bits_and_their_places(dtype):
    tensor = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    other = torch.tensor([1, 0, 0, 1, 1]).to(dtype)  # the same values elsewhere
    before = tensor.clone()
    assert not torch.equal(hash_of(tensor), hash_of(other))
    assert torch.equal(hash_of(tensor), hash_of(tensor.clone()))
    assert torch.equal(tensor, before)


def test_a_hash_tells_zeros_and_nans_apart():
    zeros = torch.zeros(3)
    assert not torch.equal(hash_of(zeros), hash_of(torch.zeros(4)))
    assert not torch.equal(hash_of(zeros), hash_of(-zeros))
    assert torch.equal(hash_of(torch.full((3,), math.nan)), hash_of(torch.full((3,), math.nan)))
    assert hash_of(torch.zeros(0)).tolist() == [0, 0, 0]


def test_a_hash_is_the_same_in_parts(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = hash_of(tensor)
    monkeypatch.setattr("megalr.guards.replicas.CHUNK", 7)
    assert torch.equal(hash_of(tensor), whole)
    assert torch.equal(hash_of(tensor.view(10, 100)), whole)


def hashes(*ranks):
    """int64 (ranks, replicas, 3) of one number a replica."""
    return torch.tensor([[[number] * 3 for number in numbers] for numbers in ranks])


def replicas(*everywhere):
    return [Replica(f"r{i}", torch.zeros(0), everywhere=each) for i, each in enumerate(everywhere)]


def test_the_majority_is_right_and_without_one_the_first_rank():
    assert differing(replicas(True, True), hashes([1, 5], [2, 5], [1, 5]), [0, 0, 0]) == {1: ["r0"]}
    assert differing(replicas(True), hashes([2], [1], [1]), [0, 0, 0]) == {0: ["r0"]}
    assert differing(replicas(True), hashes([1], [2]), [0, 0]) == {1: ["r0"]}
    assert differing(replicas(True), hashes([1], [2], [3]), [0, 0, 0]) == {1: ["r0"], 2: ["r0"]}


def test_parts_are_compared_among_ranks_that_have_the_same():
    seen = hashes([1, 7], [2, 7], [1, 7], [2, 7])
    assert differing(replicas(False, True), seen, [0, 1, 0, 1]) == {}
    assert differing(replicas(True, True), seen, [0, 1, 0, 1]) == {1: ["r0"], 3: ["r0"]}
    seen[3, 0] = 9
    assert differing(replicas(False, True), seen, [0, 1, 0, 1]) == {3: ["r0"]}


def test_parameters_persistent_buffers_and_counts_are_compared():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    found = find_replicas(model, {"updates": 3})
    assert [replica.name for replica in found] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "the counts of updates",
    ]
    assert compare_replicas(found, torch.device("cpu")) == {}


def test_words_for_what_differs():
    found = {1: [f"r{i}" for i in range(7)], 4: ["r0"]}
    assert in_words(found, 30) == "  rank 1: r0, r1, r2, r3, r4 and 2 more (7 of 30)\n  rank 4: r0 (1 of 30)"
