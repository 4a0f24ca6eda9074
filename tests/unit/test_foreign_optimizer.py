"""A model whose configuration asks for what only megalr's optimizer does is not trained by another one in silence."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import megalr
from megalr.errors import UserError

LAYERS = {"rank": 2, "target_modules": ["attn"]}
LOW_RANK = {"type": "low_rank", **LAYERS}
BALANCED = {"megalr": {"parametrization": LOW_RANK, "refactorization": {"interval": 5}}}


class Net(nn.Module):
    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)
        self.reentrant = checkpointing

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.attn(x)).sum()
        return self.head(checkpoint(self.attn, x, use_reentrant=self.reentrant)).sum()


def batch():
    return torch.randn(4, 8, requires_grad=True)


def hooks(model):
    """How many hooks of ours are left."""
    found = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    found += [hook for p in model.parameters() for hook in (p._backward_hooks or {}).values()]
    return len(found)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BALANCED, "megalr.refactorization"),
        ({"megalr": {"parametrization": LOW_RANK, "momentum_reset": {"interval": 20}}}, "megalr.momentum_reset"),
        ({"megalr": {"parametrization": {"type": "projected", **LAYERS}}}, "megalr.parametrization"),
        ({"megalr": {"parametrization": {"type": "relora", **LAYERS}}}, "megalr.parametrization"),
        ({"megalr": {"parametrization": {"type": "loro", **LAYERS}}}, "megalr.parametrization"),
        ({"megalr": {"parametrization": {"type": "switchlora", **LAYERS}}}, "megalr.parametrization"),
        ({"megalr": {"activations": {"target_modules": ["attn"], "groups": 2}}}, "megalr.activations"),
        ({"megalr": {"optimizer": {"type": "AdamW"}, "parametrization": LOW_RANK}}, "megalr.optimizer"),
        ({"optimizer": {"type": "Muon"}, "megalr": {}}, "optimizer"),
    ],
)
def test_the_first_backward_pass_says_what_to_write(config, named):
    model = megalr.parametrize(Net(), config)
    loss = model(batch())
    with pytest.raises(UserError, match=rf"has {named}, which only megalr's .*megalr.trainer_optimizer\(args"):
        loss.backward()


@pytest.mark.parametrize("kind", ["low_rank", "lora", "cola", "mora", "sltrain"])
def test_layers_that_need_nothing_are_anyones(kind):
    model = megalr.parametrize(Net(), {"megalr": {"parametrization": {"type": kind, **LAYERS}}})
    assert hooks(model) == 0
    model(batch()).backward()


def test_evaluation_and_the_callers_consent_are_left_alone():
    model = megalr.parametrize(Net(), BALANCED)
    with torch.no_grad():
        model(batch())
    model.eval()(batch())
    with pytest.raises(UserError):
        model(batch()).backward()  # from_pretrained leaves models in this mode, and many train them so
    consenting = megalr.parametrize(Net(), BALANCED, other_optimizer=True)
    consenting(batch()).backward()
    assert hooks(consenting) == 0


def test_the_optimizer_trains_and_leaves_no_hook():
    model = megalr.parametrize(Net(), BALANCED)
    model(batch())  # a look at the model, before the optimizer is there
    optimizer = megalr.build_optimizer(model, BALANCED)
    model(batch()).backward()
    optimizer.step()
    assert hooks(model) == 0 and optimizer.updates == 1


def test_an_optimizer_that_nobody_has_kept_is_none():
    """As transformers drops what is passed as ``optimizers=``."""
    model = megalr.parametrize(Net(), BALANCED)
    megalr.build_optimizer(model, BALANCED)
    with pytest.raises(UserError, match="megalr.refactorization"):
        model(batch()).backward()


def test_an_engine_that_was_given_another_optimizer_is_noticed():
    model = megalr.parametrize(Net(), BALANCED)
    optimizer = megalr.build_optimizer(model, BALANCED)
    for parameter in model.parameters():
        parameter._hp_mapping = None  # as ZeRO's stages 1 and 2 mark what they have flattened
    with pytest.raises(UserError, match="megalr.refactorization"):
        model(batch()).backward()
    for group in optimizer.param_groups:
        group["params"] = [torch.zeros(1)]  # as they exchange what they have been given
    model(batch()).backward()


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(model):
    """New parameters in the place of those that were there."""
    return model.to(device="meta").to_empty(device="cpu")


@pytest.mark.parametrize("change", [copied, pickled, emptied])
def test_a_copy_waits_for_its_own_optimizer(change):
    model = megalr.parametrize(Net(), BALANCED)
    optimizer = megalr.build_optimizer(model, BALANCED)
    other = change(megalr.parametrize(Net(), BALANCED) if change is emptied else model)
    with pytest.raises(UserError, match="megalr.refactorization"):
        other(batch()).backward()
    model(batch()).backward()
    kept = megalr.build_optimizer(other, BALANCED)
    other(batch()).backward()
    assert hooks(other) == hooks(model) == 0
    assert kept is not optimizer


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = megalr.parametrize(Net(reentrant), BALANCED)
    with pytest.raises(UserError, match="megalr.refactorization"):
        model(batch()).backward()
    optimizer = megalr.build_optimizer(model, BALANCED)
    model(batch()).backward()
    assert hooks(model) == 0 and optimizer.updates == 0


@pytest.mark.parametrize("ours", [True, False])
def test_compiled_models(ours):
    model = megalr.parametrize(Net(), BALANCED)
    optimizer = megalr.build_optimizer(model, BALANCED) if ours else None
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(batch())
    if optimizer is None:
        with pytest.raises(UserError, match="megalr.refactorization"):
            loss.backward()
    else:
        loss.backward()
        assert hooks(model) == 0
