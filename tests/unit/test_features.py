"""The table of DeepSpeed's features: it has all keys, its page says what it says, what it refuses is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import megalr
from megalr import features
from megalr.errors import UserError
from megalr.hosts.features import FEATURES, TRAINS, VERSION, children, refuse_features, sections
from tests.deepspeed import test_features as trained

ROOT = Path(__file__).parents[2]
REFUSED = [(key, each.example) for each in FEATURES if each.status == "refused" for key in each.keys]
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}


def json_with(key: str, value: Any) -> dict[str, Any]:
    """A configuration that has a value at a dotted path."""
    content: Any = value
    for name in reversed(key.split(".")):
        content = {name: content}
    return {"train_micro_batch_size_per_gpu": 1, "megalr": {"optimizer": ADAMW}, **content}


def paths(content: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The dotted paths of all keys, those of sections included."""
    for key, value in content.items():
        yield before + key
        if isinstance(value, Mapping):
            yield from paths(value, f"{before}{key}.")


def test_the_page_is_what_the_table_says():
    written = (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    assert written == features.page() + "\n", "run: python -m megalr.features > docs/deepspeed.md"


def test_every_feature_is_on_the_page():
    lines = [line for line in features.page().splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith(("| key ", "| ---"))]
    assert len(rows) == len(FEATURES) + len(features.CALLS)


def test_what_works_names_a_test_that_is_there():
    named = {each.test for each in FEATURES if each.test} | set(re.findall(r"tests/[\w/]+\.py::\w+", features.page()))
    assert all(bool(each.test) == (each.status == "works") for each in FEATURES)
    for path, _, name in (test.partition("::") for test in named):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)


def test_what_the_training_test_is_named_for_is_trained():
    cases = [changes for _, _, changes in (*trained.KEYS.values(), *trained.LASTING.values())]
    tried = {path for changes in cases for path in paths(changes)} | set(trained.BASE)
    named = {key for each in FEATURES if each.test == TRAINS for key in each.keys}
    assert named - tried == set()


def test_a_key_has_one_answer_but_for_its_values():
    keys = [(key, each.status) for each in FEATURES for key in each.keys]
    assert len(set(keys)) == len(keys)
    assert all(each.says for each in FEATURES if each.status == "refused")


def test_the_table_has_the_keys_of_this_deepspeed():
    """A new release of DeepSpeed has its own; those of sections without a model are in no list of its."""
    import deepspeed
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as OffloadOptimizer
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as OffloadParam

    assert deepspeed.__version__.startswith(VERSION)
    models: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": OffloadOptimizer,
        "zero_optimization.offload_param": OffloadParam,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    removed = {"zero_optimization": set(config._REMOVED_ZERO_CONFIG_KEYS)}
    for section, model in models.items():
        fields = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        known = set(children(section)) - removed.get(section, set())
        assert fields <= known, section
        assert {key for key in known if f"stage3_{key}" not in fields} <= fields | {"gather_fp16_weights_on_model_save"}
    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(children(""))


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda each: each if isinstance(each, str) else "")
def test_what_the_table_refuses_is_refused(key, value):
    with pytest.raises(UserError, match=rf"^{re.escape(key)} is .*, which megalr refuses: "):
        refuse_features(json_with(key, value))


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"zenflow": None, "elastic_checkpoint": False, "offload_optimizer": {"ratio": 1.0}}},
        {"zero_optimization": {"offload_param": {"device": "none"}, "prefetch_bucket_size": 10}},
        {"hybrid_engine": {"enabled": False}, "_mine": 1, "comment": "mine", "#": ["mine"]},
        {"zero_optimization": "auto", "bf16": None},
        {"aio": {"queue_depth": 8, "thread_count": 1}, "bfloat16": {"enabled": False}},
    ],
)
def test_defaults_and_comments_are_not_refused(content):
    refuse_features(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            'the JSON has no key "zero_optimisation"; did you mean "zero_optimization"?',
        ),
        ({"zero_optimization": {"stgae": 3}}, 'zero_optimization has no key "stgae"; did you mean "stage"?'),
        ({"bf16": {"enable": True}}, 'bf16 has no key "enable"; did you mean "enabled"?'),
        ({"torch_autocast": {"dytpe": "bfloat16"}}, 'torch_autocast has no key "dytpe"; did you mean "dtype"?'),
        ({"fp32_allreduce": True}, 'the JSON has no key "fp32_allreduce"'),
        ({"train_batch_size": 8, "optim": {"type": "Muon"}}, 'no key "optim"; did you mean "optimizer"?'),
        ({"train_batch_size": 8, "micro_batch_size_per_gpu": 1}, 'no key "micro_batch_size_per_gpu"; did you mean'),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer has no key",
        ),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused(content, words):
    with pytest.raises(UserError, match=re.escape(words)):
        refuse_features(content)


def test_keys_of_other_programs_stay_and_are_mentioned_once(caplog):
    content = {"train_batch_size": 8, "seed": 1, "cuda_visible_devices": "0"}
    for _ in range(2):
        refuse_features(content | {"logging_batch_size_per_gpu": None, "data_impl": "mmap", "comms": {"a": 1}})
    assert [record.args[0] for record in caplog.records] == [
        "seed",
        "cuda_visible_devices",
        "logging_batch_size_per_gpu",
        "data_impl",
        "comms",
    ]


def test_every_way_in_refuses_before_anything_is_built():
    content = json_with("zero_optimization.elastic_checkpoint", True)
    content["megalr"] |= {"parametrization": {"type": "low_rank", "rank": 2}}
    words = "^zero_optimization.elastic_checkpoint is true, which megalr refuses"
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match=words):
        megalr.initialize(model=model, config=content)
    assert type(model[0]) is nn.Linear
    with pytest.raises(UserError, match=words):
        megalr.build_optimizer(model, content)
    with pytest.raises(UserError, match=words):
        megalr.trainer_optimizer(SimpleNamespace(deepspeed=content))


def test_a_schedule_that_cycles_betas_is_refused():
    params = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 4}
    content = json_with("scheduler", {"type": "OneCycle", "params": params | {"cycle_momentum": True}})
    model = nn.Sequential(nn.Linear(4, 4))
    words = '^scheduler.params.cycle_momentum is true for OneCycle, .* write "cycle_momentum": false'
    for build in (megalr.build_optimizer, lambda model, config: megalr.initialize(model=model, config=config)):
        with pytest.raises(UserError, match=words):
            build(model, content)
    for allowed in (params, params | {"cycle_momentum": False}):
        megalr.build_optimizer(model, json_with("scheduler", {"type": "OneCycle", "params": allowed}))


def test_what_deepspeed_refuses_is_said_before_anything_is_built():
    content = json_with("comms_logger.prof_ops", 5)
    content["megalr"] |= {"parametrization": {"type": "low_rank", "rank": 2}}
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="^DeepSpeed refuses the configuration: "):
        megalr.initialize(model=model, config=content)
    assert type(model[0]) is nn.Linear


def test_experts_of_deepspeed_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.allreduce = False
    with pytest.raises(UserError, match="^0.weight belongs to a layer of deepspeed.moe"):
        megalr.build_optimizer(model, json_with("gradient_clipping", 1.0))


def test_sections_are_those_whose_keys_the_table_has():
    assert {"zero_optimization", "zero_optimization.offload_param", "bf16", "torch_autocast"} <= set(sections())
    assert "hybrid_engine" not in sections()
