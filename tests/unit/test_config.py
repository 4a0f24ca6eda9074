"""The JSON's two sections: what is accepted, and what a wrong one is told."""

import json

import pytest

from megalr.config.settings import LowRankConfig, MegalrConfig
from megalr.errors import UserError

LOW_RANK = {"type": "low_rank", "rank": 8}


def read(megalr=None, **optimizer_params):
    return MegalrConfig.from_json({"optimizer": {"type": "AdamW", "params": optimizer_params}, "megalr": megalr or {}})


def test_design_example_is_read_whole():
    config = MegalrConfig.from_json(
        {
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1.5e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}},
            "megalr": {
                "parametrization": {"type": "low_rank", "rank": 128, "alpha": 32, "target_modules": ["attn", "mlp"]},
                "refactorization": {"interval": 200, "moments": "reset"},
                "momentum_reset": {"interval": 200, "scope": "all", "warmup_steps": 10},
            },
        }
    )
    assert config.optimizer.lr == 1.5e-3
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.parametrization == LowRankConfig(rank=128, alpha=32.0, target_modules=("attn", "mlp"))
    assert config.parametrization.scale == 0.25
    assert config.refactorization.interval == 200
    assert config.momentum_reset.scope == "all"


def test_groups_take_overrides_and_norms_are_not_decayed_by_default():
    config = read(lr=3e-3, weight_decay=0.1, embedding={"lr": 1e-2})
    assert config.optimizer.embedding.lr == 1e-2
    assert config.optimizer.embedding.weight_decay is None
    assert config.optimizer.norm.weight_decay is None


def test_a_path_is_read_and_a_missing_or_broken_one_is_named(tmp_path):
    good = tmp_path / "with space" / "ds.json"
    good.parent.mkdir()
    good.write_text(json.dumps({"megalr": {"seed": 3}}))
    assert MegalrConfig.from_json(good).seed == 3
    with pytest.raises(UserError, match="no DeepSpeed configuration at .*nowhere.json"):
        MegalrConfig.from_json(tmp_path / "nowhere.json")
    good.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        MegalrConfig.from_json(good)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"parametrisation": LOW_RANK}, 'megalr has no key "parametrisation"; did you mean "parametrization"'),
        ({"parametrization": LOW_RANK, "refactorization": {"intervall": 5}}, 'did you mean "interval"'),
        ({"parametrization": {"type": "lowrank", "rank": 8}}, 'type is .lowrank.; did you mean "low_rank"'),
        ({"parametrization": {"rank": 8}}, 'an object with a "type"'),
        ({"parametrization": {"type": ["low_rank"]}}, r"type is \['low_rank'\]"),
        ({"parametrization": {"type": "low_rank", "target_modules": ["attn", ""]}}, 'is empty or names ""'),
        ({"parametrization": {"type": "low_rank", "rank": 0}}, "rank is 0; write a whole number of at least 1"),
        ({"parametrization": {"type": "low_rank", "rank": 8.5}}, "rank is 8.5; expected a whole number"),
        ({"parametrization": {"type": "low_rank", "rank": True}}, "rank is true; expected a whole number"),
        ({"parametrization": {"type": "low_rank", "alpha": -1}}, "alpha is -1.0; write a positive number"),
        ({"parametrization": {"type": "low_rank", "target_modules": []}}, "target_modules is empty"),
        ({"parametrization": {"type": "low_rank", "init": "zeros"}}, '"variance_matched", "kaiming_uniform"'),
        ({"parametrization": LOW_RANK, "refactorization": {"interval": 0}}, "interval is 0; write at least 1"),
        ({"parametrization": LOW_RANK, "refactorization": {}}, 'megalr.refactorization needs "interval"'),
        ({"parametrization": LOW_RANK, "refactorization": {"interval": 5, "moments": "drop"}}, '"reset", "transport"'),
        ({"parametrization": LOW_RANK, "momentum_reset": {"interval": 50, "warmup_steps": -1}}, "write at least 0"),
        ({"parametrization": LOW_RANK, "momentum_reset": {"interval": 5}}, '"warmup_steps": 4 or less'),
        ({"refactorization": {"interval": 5}}, "needs low-rank factors"),
        ({"momentum_reset": {"interval": 50}}, 'write "scope": "all"'),
        ({"seed": "one"}, 'megalr.seed is "one"; expected a whole number'),
        ([], '"megalr" must be an object'),
    ],
)
def test_wrong_megalr_section_is_told_what_to_write(section, message):
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json({"megalr": section})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "AdamX"}, 'did you mean "AdamW"'),
        ({"params": {}}, 'an object with a "type"'),
        ({"type": "AdamW", "params": {"learning_rate": 1}}, 'optimizer.params has no key "learning_rate"'),
        ({"type": "AdamW", "params": {"lr": "auto"}}, 'optimizer.params.lr is "auto"; write a number, or'),
        ({"type": "AdamW", "params": {"lr": -1}}, "lr is -1.0; write a number of at least 0"),
        ({"type": "AdamW", "params": {"betas": [0.9]}}, "optimizer.params.betas is"),
        ({"type": "AdamW", "params": {"betas": [0.9, 1.0]}}, r"must lie in \[0, 1\)"),
        ({"type": "AdamW", "params": {"eps": 0}}, "eps is 0.0; write a positive number"),
        (
            {"type": "AdamW", "params": {"embedding": {"lrr": 1}}},
            'optimizer.params.embedding has no key "lrr"; did you',
        ),
        ({"type": "AdamW", "param": {}}, 'did you mean "params"'),
        ({"type": "AdamW", "params": None}, "optimizer.params must be an object"),
    ],
)
def test_wrong_optimizer_section_is_told_what_to_write(optimizer, message):
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json({"optimizer": optimizer})
