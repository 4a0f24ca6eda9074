"""The references themselves: AdamW against torch's, their dtypes, and what the factory takes from a JSON."""

import pytest
import torch

from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.rules.registry import RULES
from megalr.seeding import generator
from tests.references import REFERENCES, reference_for
from tests.references.adamw import AdamW
from tests.references.parametrizations import CASES, SETTINGS
from tests.unit.rule_runs import drifting_gradients


def test_adamw_equals_torch():
    weight = torch.ones(7, 5, dtype=torch.float64)
    expected = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([expected], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    reference = AdamW((7, 5), betas=(0.8, 0.95), eps=1e-6)
    for grad in drifting_gradients((7, 5), 10):
        reference.step(weight, grad.double(), 0.01, 0.1)
        expected.grad = grad.double()
        optimizer.step()
    torch.testing.assert_close(weight, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("type_name", REFERENCES)
def test_weight_is_updated_in_place_and_the_gradient_left_alone(type_name, dtype):
    params = {"rank": 4, "update_proj_gap": 2, "random_from": 2}
    reference = reference_for(type_name, (12, 20), params, seed=0, name="w", phase=1)
    weight = torch.nn.Parameter(torch.zeros(12, 20, dtype=dtype))
    for grad in drifting_gradients((12, 20), 4):
        given = grad.to(dtype)
        reference.step(weight, given, 0.01, 0.1)
        assert torch.equal(given, grad.to(dtype))
    assert weight.dtype == dtype and weight.any() and torch.isfinite(weight).all()


def test_factory_takes_what_is_of_the_rule():
    params = {
        "lr": 0.01,
        "weight_decay": 0.1,
        "embedding": {"lr": 0.001},
        "target_modules": ["attn"],
        "rank": 3,
        "update_proj_gap": 10,
        "random_from": 20,
        "betas": [0.8, 0.9],
        "stagger": True,
    }
    reference = reference_for("GoLoreAdamW", (12, 20), params, seed=5, name="w", phase=4)
    assert (reference.rank, reference.gap, reference.phase, reference.random_from) == (3, 10, 4, 20)
    assert (reference.adam.beta1, reference.adam.beta2, reference.moments) == (0.8, 0.9, "transport_first")
    assert torch.equal(reference.draw(2, "left", 12, 3), torch.randn(12, 3, generator=generator(5, "w", "left", 2)))
    with pytest.raises(NotImplementedError, match="power"):
        reference_for("GaLoreAdamW", (12, 20), {"projector": "power"}, seed=0, name="w", phase=0)


def test_refreshes_follow_gap_and_phase():
    reference = reference_for("GaLoreAdamW", (12, 20), {"rank": 2, "update_proj_gap": 5}, seed=0, name="w", phase=3)
    due = []
    for step, grad in enumerate(drifting_gradients((12, 20), 15)):
        due += [step] * reference.refresh_due(step)
        reference.update(grad)
    assert due == [0, 3, 8, 13] and reference.refreshes == 4


def own(registry):
    """Names of what the package brings, and no test's plugin."""
    return {name for name, cls in registry.items() if cls is None or cls.__module__.startswith("megalr.")}


def test_every_rule_has_a_reference():
    """In tests/references/, with the settings that tests train it with."""
    assert own(RULES) == REFERENCES.keys()
    for name, reference in REFERENCES.items():
        assert MegalrConfig.from_json({"optimizer": {"type": name, "params": dict(reference.trained_with)}})


def test_every_parametrization_has_a_plain_reference():
    """In tests/references/parametrizations/, among the cases that meet every stage."""
    held = {case.megalr["parametrization"]["type"] for case in CASES.values() if "parametrization" in case.megalr}
    assert held == own(PARAMETRIZATIONS) - {"full"}
    assert all(case.plain is not None for case in CASES.values())
    assert not CASES.keys() & SETTINGS.keys()


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "AdamW"])
def test_what_may_train_factors_says_with_which_settings(name):
    params = {
        key: REFERENCES[name].trained_with[key] for key in ("random_from",) if key in REFERENCES[name].trained_with
    }
    config = {"optimizer": {"type": name, "params": params}, "megalr": {"parametrization": {"type": "low_rank"}}}
    if REFERENCES[name].on_factors is None:
        with pytest.raises(UserError, match=".*what such layers train is small already.*AdamW"):
            MegalrConfig.from_json(config)
    else:
        assert MegalrConfig.from_json(config).optimizer.rule is not None
