"""The optimizer section of a rule: what it becomes, and what is said about mistakes."""

import pytest
import torch
from torch import nn

import megalr
from megalr.config.settings import MegalrConfig
from megalr.optim.groups import parameter_groups
from megalr.rules.galore import GaLore
from megalr.rules.registry import RULES
from tests.unit.rule_runs import needed

ENDS = ("embedding", "head")


def config(kind="GaLoreAdamW", section=None, **params):
    return MegalrConfig.from_json({"optimizer": {"type": kind, "params": params}, "megalr": section or {}})


def model():
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 8),
            "attn": nn.Linear(8, 8),
            "mlp": nn.Linear(8, 12, bias=False),
            "pool": nn.Conv1d(8, 4, 3),
            "norm": nn.LayerNorm(8),
            "lm_head": nn.Linear(8, 9, bias=False),
        }
    )


def test_rule_and_settings():
    optimizer = config(lr=0.02, rank=4, update_proj_gap=50, betas=[0.8, 0.9], scale=1).optimizer
    assert optimizer.rule == GaLore(rank=4, update_proj_gap=50, betas=(0.8, 0.9), scale=1.0)
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (0.02, (0.8, 0.9), 1e-6)
    assert config("Muon").optimizer.lr == 1e-3
    assert config("AdamW").optimizer.rule is None


@pytest.mark.parametrize("spelling", ["galore_adamw", "GALOREADAMW", "GaLore-AdamW"])
def test_names_as_other_libraries_spell_them(spelling):
    assert isinstance(config(spelling).optimizer.rule, GaLore)


@pytest.mark.parametrize("kind", RULES)
def test_every_name_makes_its_rule(kind):
    rule = config(kind, **needed(kind)).optimizer.rule
    assert type(rule) is (RULES[kind] or type(None))


def test_optimizer_inside_the_megalr_section():
    section = {"optimizer": {"type": "Muon", "params": {"lr": 0.5}}}
    assert MegalrConfig.from_json({"megalr": section}).optimizer.lr == 0.5
    with pytest.raises(megalr.UserError, match="both given"):
        MegalrConfig.from_json({"megalr": section, "optimizer": {"type": "AdamW"}})


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("GaLore2", {}, "did you mean"),
        ("galore", {}, 'did you mean "GaLoreAdamW"'),
        (None, {}, "type is null; write one of"),
        ("GaLoreAdamW", {"scale": float("inf")}, "scale is Infinity: write a finite number"),
        ("Muon", {"ns_coefficients": [float("nan"), 1, 2]}, r"ns_coefficients\[0\] is NaN: write a finite"),
        ("Muon", {"ns_coefficients": [1, 2]}, "a list of 3 numbers"),
        ("GaLoreAdamW", {"rnak": 4}, 'no key "rnak"; did you mean "rank"'),
        ("GaLoreAdamW", {"projector": "qr"}, 'one of "svd", "eigh", "randomized", "power", "random"'),
        ("GaLoreAdamW", {"proj_type": "both"}, 'one of "std", "reverse_std", "left", "right", "full"'),
        ("GaLoreAdamW", {"rank": 0}, "rank is 0; write a positive number"),
        ("GaLoreAdamW", {"update_proj_gap": -1}, "update_proj_gap is -1"),
        ("GaLoreAdamW", {"stagger": 1}, "true or false"),
        ("GaLoreAdamW", {"adamw": {"lr": -1}}, "at least 0"),
        ("GoLoreAdamW", {}, 'needs "random_from"'),
        ("FiraAdamW", {"proj_type": "full"}, 'which Fira does not define; write "std"'),
        ("APOLLO", {"projector": "svd"}, 'no key "projector"'),
        ("LDAdamW", {"moments": "reset"}, 'no key "moments"'),
        ("LDAdamW", {"rho": 1.0}, r"rho is 1.0; write a number in \[0, 1\)"),
        ("Muon", {"rank": 4}, 'no key "rank"'),
        ("Muon", {"momentum": 1.0}, "momentum is 1.0"),
        ("AdamW", {"target_modules": ["attn"]}, 'no key "target_modules"'),
        ("AdamW", {"head": True}, 'no key "head"'),
        ("Muon", {"head": 1}, "head is 1; expected true or false"),
        ("SCALE", {"momentum": 1.0}, "momentum is 1.0"),
        ("CAME", {"beta3": 1.0}, "beta3 is 1.0"),
        ("QGaLoreAdamW", {"rank": 8, "cos_threshold": -2.0}, "cos_threshold is -2.0; write a number of at least -1"),
        ("CAME", {"eps2": 0.0}, "eps2 is 0.0; write a positive number"),
        ("FRUGAL", {"density": 0.0}, r"density is 0.0; write a number in \(0, 1\]"),
        ("FRUGAL", {"rank": 4}, 'no key "rank"'),
        ("FRUGAL", {"moments": "transport"}, 'which needs a basis: write "reset" or "keep"'),
        ("FRUGAL", {"projector": "svd", "proj_type": "full"}, "which FRUGAL does not define"),
        ("BAdam", {"switch_interval": 0}, "switch_interval is 0"),
        ("BAdam", {"blocks": []}, r"blocks is empty or names"),
        ("AdaRankGrad", {"energy": 1.1}, r"energy is 1.1; write a number in \(0, 1\]"),
        ("AdaRankGrad", {"projector": "power"}, 'one of "svd", "eigh", "randomized"'),
        ("QGaLoreAdamW", {"moments": "reset"}, 'no key "moments"'),
        ("QGaLoreAdamW", {"gamma_proj": 0.5}, "gamma_proj is 0.5; write a number of at least 1"),
        ("QGaLoreAdamW", {"proj_type": "full"}, "which Q-GaLore does not define"),
        ("AdamW", {"adamw": {"lr": 1e-3}}, 'no key "adamw"'),
        ("GaLoreAdamW", {"lr": "auto"}, '"auto"; write a number'),
    ],
)
def test_mistakes(kind, params, message):
    with pytest.raises(megalr.UserError, match=message):
        config(kind, **params)


def test_combinations_that_are_refused():
    with pytest.raises(megalr.UserError, match='"low_rank" factors cannot be trained with galore'):
        config(section={"parametrization": {"type": "low_rank", "rank": 2}})


@pytest.mark.parametrize("kind", [name for name, rule in RULES.items() if rule and not rule.reset_keys])
def test_advice_to_those_whom_no_momentum_reset_can_reset(kind):
    with pytest.raises(megalr.UserError, match="momentum_reset cannot reset .*: remove it") as error:
        config(kind, section={"momentum_reset": {"interval": 50, "scope": "all"}}, **needed(kind))
    if '"moments": "reset"' in str(error.value):
        assert config(kind, moments="reset", **needed(kind)).optimizer.rule.moments == "reset"
    else:
        with pytest.raises(megalr.UserError, match='no key "moments"'):
            config(kind, moments="reset", **needed(kind))


def groups(rank=4, **params):
    return {g.name: g for g in parameter_groups(model(), config(rank=rank, lr=0.02, **params).optimizer)}


def test_every_parameter_has_one_group():
    found = groups(weight_decay=0.1, adamw={"lr": 1e-3}, embedding={"lr": 0.5}, norm={"eps": 1e-3})
    names = {name: list(group.parameters) for name, group in found.items()}
    assert names == {
        "matrices": ["attn.weight", "mlp.weight"],
        "trunk": ["pool.weight"],
        "embedding": ["embed.weight", "lm_head.weight"],
        "norm": ["attn.bias", "pool.bias", "norm.weight", "norm.bias"],
    }
    assert {name: group.settings.lr for name, group in found.items()} == {
        "matrices": 0.02,
        "trunk": 1e-3,
        "embedding": 0.5,
        "norm": 1e-3,
    }
    assert found["norm"].settings.weight_decay == 0.0 and found["trunk"].settings.weight_decay == 0.1
    assert found["norm"].settings.eps == 1e-3


def test_target_modules_choose_by_name():
    assert list(groups(target_modules=["mlp"])["matrices"].parameters) == ["mlp.weight"]
    assert list(groups(target_modules="attn.*")["matrices"].parameters) == ["attn.weight"]
    # Three dimensions are a stack, where they are asked for by name.
    assert list(groups(target_modules=["pool"], rank=3)["matrices"].parameters) == ["pool.weight"]
    with pytest.raises(megalr.UserError, match="'ffn' matches no matrix; the model has: attn.weight"):
        groups(target_modules=["ffn"])
    # Embeddings and the head are never chosen.
    with pytest.raises(megalr.UserError, match="'lm_head' matches no matrix"):
        groups(target_modules=["lm_head"])


def test_head_and_embeddings_where_the_rule_has_them():
    def by(**params):
        found = groups(adamw={"lr": 1e-3}, embedding={"eps": 1e-3}, rank=3, **params)
        return {n: (list(g.parameters), g.rule is not None, g.settings.lr) for n, g in found.items() if n in ENDS}

    embed, head = ["embed.weight"], ["lm_head.weight"]
    assert by() == {"embedding": (embed + head, False, 1e-3)}
    assert by(head=True) == {"embedding": (embed, False, 1e-3), "head": (head, True, 0.02)}
    assert by(embeddings=True) == {"embedding": (embed, True, 0.02), "head": (head, False, 1e-3)}
    assert by(head=True, embeddings=True) == {"embedding": (embed, True, 0.02), "head": (head, True, 0.02)}
    assert groups(head=True, embedding={"lr": 0.5})["head"].settings.lr == 0.5
    for key in ("head", "embeddings"):
        with pytest.raises(megalr.UserError, match=f'trains no {key}.*: remove "{key}"'):
            parameter_groups(nn.Sequential(nn.Linear(5, 4)), config(rank=4, **{key: True}).optimizer)


def test_a_rank_above_every_matrix_is_refused():
    with pytest.raises(megalr.UserError, match="rank is 9, but no matrix .* more than 8 rows and columns"):
        parameter_groups(model(), config(rank=9).optimizer)


def test_a_matrix_without_elements_is_left_alone():
    net = nn.Sequential(nn.Linear(0, 3), nn.Linear(5, 4))
    found = {g.name: list(g.parameters) for g in parameter_groups(net, config(rank=4).optimizer)}
    assert found["matrices"] == ["1.weight"] and "trunk" not in found


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(megalr.UserError, match="no linear layer"):
        parameter_groups(nn.Sequential(nn.LayerNorm(4)), config().optimizer)


def test_plain_pytorch_training_without_deepspeed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = megalr.build_optimizer(
        net, {"optimizer": {"type": "GaLoreAdamW", "params": {"rank": 2, "update_proj_gap": 5}}}
    )
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.rule_calls == 2 * 60
    assert "galore: 2 matrices with 108 elements projected to rank 2" in optimizer.summary()
    assert "0.weight 12 x 6 matrices galore 2" in " ".join(optimizer.routing_table().split())
