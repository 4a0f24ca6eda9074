"""Counted operations: of real layers, by hand, and what is left out."""

import functools
import gc
import inspect
import sys
from types import FunctionType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from megalr.config.settings import MegalrConfig
from megalr.layers import parametrize
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.velora import compress_activations, compressed_layers
from megalr.train.flops import flops_of_update, model_flops
from megalr.train.models import build_model

SEQUENCES, LENGTH, RANK = 3, 16, 4
WIDTH, INNER, LAYERS, WORDS = 32, 48, 2, 64
SHAPE = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=WORDS,
    max_position_embeddings=64,
)
KEYS_AND_VALUES = WIDTH // 2
# Outputs and inputs of the seven linear layers of a block.
LINEAR = [(WIDTH, WIDTH)] * 2 + [(KEYS_AND_VALUES, WIDTH)] * 2 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]


def config(kind, **sections):
    parametrization = {"type": kind, "rank": RANK}
    if kind == "full":
        parametrization = {"type": "full"}
    return MegalrConfig.from_json({"megalr": {"parametrization": parametrization, **sections}})


def counted(megalr):
    return model_flops(SHAPE, megalr, sequences=SEQUENCES, sequence_length=LENGTH)


def really_done(megalr):
    """What torch counts while the layers work on numbers."""
    model = parametrize(build_model(SHAPE, seed=0), megalr.parametrization).train()
    if megalr.activations is not None:
        compress_activations(model, megalr.activations)
        for layer in compressed_layers(model).values():
            layer.direction = torch.ones(layer.in_features // layer.groups)
    tokens = torch.randint(WORDS, (SEQUENCES, LENGTH))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", sorted(PARAMETRIZATIONS))
def test_the_count_is_that_of_the_layers_at_work(kind):
    assert counted(config(kind)) == really_done(config(kind)) > 0


def test_compressed_activations_are_counted_as_from_the_second_update_on():
    megalr = config("full", activations={"type": "velora", "groups": 8})
    assert counted(megalr) == really_done(megalr) < counted(config("full"))


def by_hand(per_token):
    """Forward and twice that backward, for a number of products of each token in a block's linear layers."""
    tokens = SEQUENCES * LENGTH
    attention = 2 * LENGTH * WIDTH  # products of one token: scores, and their sum of values
    return 3 * 2 * tokens * (LAYERS * (per_token + attention) + WIDTH * WORDS)


def test_dense_layers_by_hand():
    assert counted(config("full")) == by_hand(sum(m * n for m, n in LINEAR))


def test_low_rank_layers_by_hand():
    assert counted(config("low_rank")) == by_hand(sum(RANK * (m + n) for m, n in LINEAR))


def test_a_frozen_weight_has_no_gradient():
    """LoRA: W0 forward and for the gradient of x; the factors have both gradients."""
    frozen, factors = sum(m * n for m, n in LINEAR), sum(RANK * (m + n) for m, n in LINEAR)
    expected = by_hand(frozen + factors) - 2 * SEQUENCES * LENGTH * LAYERS * frozen
    assert counted(config("lora")) == expected


def test_counting_leaves_random_numbers_alone(monkeypatch):
    """Also where somebody's layers draw some as they are made."""
    monkeypatch.setattr("megalr.train.flops.parametrize", lambda *given: (torch.rand(1), parametrize(*given))[1])
    before = torch.get_rng_state()
    counted(config("lora"))
    assert torch.equal(before, torch.get_rng_state())


def test_an_update_is_all_its_passes():
    one = counted(config("full"))
    assert flops_of_update(SHAPE, config("full"), sequences=SEQUENCES, passes=6, sequence_length=LENGTH) == 6 * one


def test_layers_that_cannot_be_counted_are_said(caplog, monkeypatch):
    def forward(self, x):
        return x * x.sum().item()

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert flops_of_update(SHAPE, config("full"), sequences=1, passes=1, sequence_length=4) is None
    assert "operations cannot be counted" in caplog.text


def forget():
    """Empty what functions of megalr keep of earlier calls."""
    for name, module in sys.modules.copy().items():
        for found in vars(module).values() if name.startswith("megalr.") else ():
            if isinstance(found, FunctionType) and hasattr(found, "__wrapped__"):
                inspect.getclosurevars(found).nonlocals.get("found", {}).clear()
            elif isinstance(found, functools._lru_cache_wrapper):
                found.cache_clear()


def trained(megalr):
    """Losses of three updates, in fp32 on a CPU, and all parameters."""
    torch.manual_seed(0)
    model = parametrize(build_model(SHAPE, seed=0), megalr.parametrization).train()
    if megalr.activations is not None:
        compress_activations(model, megalr.activations)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for tokens in torch.randint(WORDS, (3, SEQUENCES, LENGTH)):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        for layer in compressed_layers(model).values():
            layer.direction = torch.ones(layer.in_features // layer.groups)
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


VELORA = {"activations": {"type": "velora", "groups": 8}}


def fake_tensors():
    return {id(found) for found in gc.get_objects() if type(found) is FakeTensor}


@pytest.mark.parametrize(("kind", "sections"), [*((kind, {}) for kind in sorted(PARAMETRIZATIONS)), ("full", VELORA)])
def test_a_count_leaves_nothing_that_training_uses(kind, sections):
    """Neither does an evaluation in inference mode."""
    forget()
    losses, parameters = trained(config(kind, **sections))
    forget()
    others = fake_tensors()  # of other tests
    counted(config(kind, **sections))
    gc.collect()
    assert not fake_tensors() - others
    tokens = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)
    with torch.inference_mode():
        parametrize(build_model(SHAPE, seed=0), config(kind).parametrization)(input_ids=tokens)

    again, their_parameters = trained(config(kind, **sections))

    assert again == losses
    assert all(torch.equal(their_parameters[name], parameter) for name, parameter in parameters.items())
