"""Ranks that have something else than the others hear it before they train."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
import torch
from torch import nn

import megalr
from megalr import agreement
from megalr.agreement import agree, code_facts, differences, digest_of_files, gathered, json_facts
from megalr.errors import UserError
from megalr.optim import facts as optimizer_facts
from megalr.optim.facts import facts_of
from megalr.train.ranks import AgreedError, Ranks
from tests.world.threads import world

CONFIG = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "megalr": {"seed": 3}}


def rank():
    return torch.distributed.get_rank()


def complaint(act, *args):
    """What an act says that fails on this rank; empty where it does not."""
    try:
        act(*args)
    except UserError as error:
        return str(error)
    return ""


def test_the_same_facts_are_one_message_of_32_bytes(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "all_gather", lambda out, own, group: sent.append(own.numel()))
    monkeypatch.setattr(agreement.torch, "equal", lambda *_: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    agree({"a": "1"}, more=lambda: pytest.fail("it was asked for more"))
    assert sent == [32]


def test_one_process_agrees_with_itself():
    agree({"a": "1"})
    assert world(1, gathered, 5) == [[5]]


def test_all_ranks_say_who_differs_in_what():
    def job():
        facts = {"megalr.seed": "4" if rank() == 1 else "3", "lr": "0.1"}
        return complaint(agree, facts, lambda: {"the file x.txt": "abc" if rank() == 1 else "def"})

    said = world(3, job)
    assert said[0] == said[1] == said[2]
    assert f"  megalr.seed: 4 on rank 1 ({agreement.socket.gethostname()}), and 3 on the others" in said[0]
    assert "the file x.txt: abc on rank 1" in said[0] and "  lr:" not in said[0]
    assert world(3, lambda: complaint(agree, {"lr": "0.1"})) == [""] * 3


def test_what_cannot_be_found_out_leaves_nobody_waiting():
    def more():
        raise OSError("no such file") if rank() else UserError("none")

    for said in world(2, lambda: complaint(agree, {"lr": str(rank())}, more)):
        assert "what else was looked for: no such file on rank 1" in said


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["1", "1", "2"], "  k: 2 on rank 2 (c), and 1 on the others"),
        (["1", "2"], "  k: 2 on rank 1 (b), and 1 on the others"),  # without a majority it is the first rank's
        (["3", "1", "1"], "  k: 3 on rank 0 (a), and 1 on the others"),
        (["1", "2", "3", "1", "1"], "  k: 2 on rank 1 (b), 3 on rank 2 (c), and 1 on the others"),
        (["1", None, "1"], "  k: none on rank 1 (b), and 1 on the others"),
        (
            ["1"] * 7 + ["2"] * 6,
            "  k: 2 on rank 7 (h), rank 8 (i), rank 9 (j), rank 10 (k), 2 more ranks, and 1 on",
        ),
    ],
)
def test_the_majority_is_expected(values, line):
    found = differences([{} if v is None else {"k": v} for v in values], "abcdefghijklm"[: len(values)])
    assert len(found) == 1 and found[0].startswith(line)


def test_few_differences_are_shown():
    found = differences([{str(i): "1" for i in range(9)}, {str(i): "2" for i in range(9)}], "ab")
    assert len(found) == 6 and found[-1] == "  and 4 more"


def test_facts_of_a_json_leave_out_what_is_a_ranks_own():
    content = {
        "wandb": {"api_key": "secret"},
        "steps_per_print": 1,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"nvme_path": "/local/0", "device": "cpu"}},
        "megalr": {"plugins": ["a.py"], "refactorization": {"interval": 200}},
        "long": "x" * 100,
    }
    facts = json_facts(content)
    assert (
        facts.pop("long").startswith('"xxx') and json_facts({"long": "x" * 101})["long"] != json_facts(content)["long"]
    )
    assert facts == {
        "zero_optimization.stage": "3",
        "zero_optimization.offload_optimizer.device": '"cpu"',
        "megalr.refactorization.interval": "200",
    }


def test_facts_of_code(tmp_path, monkeypatch):
    facts = code_facts()
    assert facts["torch"] == metadata.version("torch") and facts["megalr"] == megalr.version.__version__
    (tmp_path / "a.py").write_text("1")
    before = digest_of_files([tmp_path / "a.py"])
    (tmp_path / "a.py").write_text("2")
    assert digest_of_files([tmp_path / "a.py"]) != before
    plugin = {"megalr": {"plugins": [str(tmp_path / "a.py"), "megalr.version", "not.there"]}}
    named = {key: value for key, value in facts_of(nn.Linear(2, 2), plugin).items() if key.startswith("the plugin")}
    assert list(named) == ["the plugin a.py", "the plugin megalr.version", "the plugin not.there"]
    assert named["the plugin not.there"] == "not there" and "not there" not in list(named.values())[:2]


def test_facts_of_models():
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight.requires_grad_(False)
    before = {key: value for key, value in facts_of(net, {}).items() if key.startswith("the parameter")}
    assert before == {
        "the parameter 0.weight": "(2, 3) float32, trained",
        "the parameter 1.weight": "(2, 2) float32, frozen",
    }
    net[0].weight.tensor_model_parallel = True  # as Megatron-LM's layers have it
    assert facts_of(net, {})["the parameter 0.weight"] == "cut between tensor-parallel ranks, trained"
    net.topology = lambda: None  # as a PipelineModule
    assert not any(key.startswith("the parameter") for key in facts_of(net, {}))


OTHERS = {
    "JSON": ("megalr.seed: 4 on rank 1", {"megalr": {"seed": 4}}, 3),
    "shape": ("the parameter 0.weight: (2, 5) float32, trained on rank 1", {}, 5),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_optimizers_first_step_makes_ranks_agree(other):
    words, changes, width = OTHERS[other]

    def job():
        differs = rank() == 1
        net = nn.Sequential(nn.Linear(width if differs else 3, 2))
        optimizer = megalr.build_optimizer(net, {**CONFIG, **(changes if differs else {})})
        net(torch.ones(1, net[0].in_features)).sum().backward()
        return complaint(optimizer.step), optimizer.updates

    for said, updates in world(3, job):
        assert words in said and updates == 0


def test_ranks_that_agree_train():
    def job():
        net = nn.Linear(3, 2)
        optimizer = megalr.build_optimizer(net, CONFIG)
        for _ in range(2):
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return optimizer.updates

    assert world(2, job) == [2, 2]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("Nonsense", r'optimizer.type: "Nonsense" on rank 1 .*, and "AdamW" on the others'),
        ("no", r'the configuration: optimizer.type is "no", a string: .* on rank 1 .*, and can be read on the others'),
    ],
)
def test_initialize_makes_ranks_agree_before_one_of_them_refuses_something(kind, line):
    def job():
        config = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "type": kind if rank() else "AdamW"}}
        return complaint(megalr.initialize, nn.Linear(3, 2), config)

    for said in world(2, job):
        assert re.search(line, said)


def test_another_version_of_a_package_is_named(monkeypatch):
    def facts():
        return {**code_facts(), "torch": "1.0"} if torch.distributed.is_initialized() and rank() else code_facts()

    monkeypatch.setattr(optimizer_facts, "code_facts", facts)
    for said in world(2, lambda: complaint(megalr.initialize, nn.Linear(3, 2), CONFIG)):
        assert f"torch: 1.0 on rank 1 ({agreement.socket.gethostname()}), and {torch.__version__.split('+')[0]}" in said


def test_the_launcher_ends_all_ranks_together():
    def job():
        ranks = Ranks(rank=rank(), local_rank=0, world_size=2, device=torch.device("cpu"))
        with pytest.raises(AgreedError, match="--steps: 5 on rank 1"):
            ranks.agree({"--steps": "5" if rank() else "4"})
        return True

    assert world(2, job) == [True, True]
