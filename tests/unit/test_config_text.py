"""The JSON as text: whatever is in it, the answer is a dictionary or a sentence with the key in it."""

import json

import pytest

from megalr.config.settings import MegalrConfig, read_json
from megalr.errors import UserError
from megalr.hosts.deepspeed_config import check_deepspeed_config

GOOD = {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def refused(text, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        MegalrConfig.from_json(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "lr": 1.0}}}',
            '"lr" twice in one object, 0.001 and 1.0',
        ),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', '"bf16" twice'),
        ('{"gradient_clipping": NaN}', "gradient_clipping is NaN: write a finite number"),
        (
            '{"optimizer": {"type": "AdamW", "params": {"betas": [0.9, Infinity]}}}',
            "optimizer.params.betas[1] is Infinity",
        ),
        ('{"gradient_clipping": 1e999}', "gradient_clipping is Infinity"),
        ('{"gradient_clipping": -1.0}', "gradient_clipping is -1.0: write a number of at least 0"),
        ('{"gradient_clipping": "1.0"}', 'gradient_clipping is "1.0": write a number'),
        ('{"gradient_clipping": true}', "gradient_clipping is true: write a number"),
        ('{"train_batch_size": 0}', "train_batch_size is 0: write a whole number of at least 1"),
        ('{"train_batch_size": 1.5}', "train_batch_size is 1.5: write a whole number"),
        ('{"bf16": {"enabled": "false"}}', 'bf16.enabled is "false", a string: write false'),
        ('{"bf16": {"enabled": "True"}}', 'bf16.enabled is "True", a string: write true'),
        ('{"zero_optimization": true}', '"zero_optimization" must be an object like {...}, not true'),
        ('{"megalr": []}', '"megalr" must be an object'),
        ('{\n"train_batch_size": ' + "9" * 5000 + "}", "line 2, has a number of 5,000 digits, 99999"),
        ('{"gradient_clipping": 1' + "0" * 400 + "}", "gradient_clipping is a whole number of 401 digits"),
        ('{"gradient_predivide_factor": null}', "gradient_predivide_factor is null: write a number above 0"),
        ('{"prescale_gradients": 1}', "prescale_gradients is 1: write true or false"),
        ('{"zero_optimization": {"contiguous_gradients": 0}}', "contiguous_gradients is 0: write true or false"),
        ('{"zero_optimization": {"zero_hpz_partition_size": true}}', "zero_hpz_partition_size is true: write a whole"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4: write a whole number from 0 to 3"),
        ('{"scheduler": {"params": {"warmup_type": "cosine"}}}', 'warmup_type is "cosine": write one of log, linear'),
        ('{"scheduler": {"params": {"cos_min_ratio": "0.1"}}}', 'cos_min_ratio is "0.1": write a number from 0 to 1'),
        ('{"scheduler": {"params": {"warmup_max_lr": -1}}}', "warmup_max_lr is -1: write a number of at least 0"),
        ('{"optimizer": {"type": "AdamW", "params": 1}}', '"optimizer.params" must be an object like {...}, not 1'),
        ('{"gradient_cliping": 1.0}', 'the JSON has no key "gradient_cliping"; did you mean "gradient_clipping"?'),
        (
            '{"scheduler": {"params": {"warmup_nmu_steps": 2}}}',
            'scheduler.params has no key "warmup_nmu_steps"; did you',
        ),
        ('{"pf16": {}}', 'the JSON has no key "pf16"; did you mean'),
        ('{"Gradient_Clipping": 1.0}', 'did you mean "gradient_clipping"?'),
        ('{"gradient_clippingg": 1.0}', 'did you mean "gradient_clipping"?'),
        ('{"hidden_size": 64}', 'the JSON has no key "hidden_size"'),
        ('{"activation_checkpointing": {"profil": true}}', 'activation_checkpointing has no key "profil"'),
        ("[" * 100_000 + "]" * 100_000, "is not valid JSON: its brackets lie too deep"),
        ('{"a": ' * 200 + "1" + "}" * 200, "deeper than 100 objects and lists"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ("[]", "must hold a JSON object, not a list"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_sentence_with_the_key(text, words, tmp_path):
    assert words in refused(text, tmp_path)


def test_the_same_of_a_dictionary():
    with pytest.raises(UserError, match="gradient_clipping is NaN"):
        MegalrConfig.from_json({**GOOD, "gradient_clipping": float("nan")})


def test_what_only_looks_wrong_is_accepted():
    content = {
        **GOOD,
        "_notes": {"of": "somebody else"},
        "comment": "not comet",
        "gradient_clipping": None,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": None, "offload_param": None},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": None}},
    }
    assert read_json(content) == content


def test_a_mark_of_byte_order_is_no_mistake(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    assert read_json(path) == GOOD


def test_words_of_monitors_may_be_any(tmp_path):
    content = {**GOOD, "tensorboard": {"enabled": True, "job_name": "on"}}
    assert read_json(content) == content


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"type": "StepLR", "params": {"gamma": 0.5}}, 'scheduler.params needs "step_size"'),
        ({"params": {}}, 'scheduler needs a "type"'),
        ({"type": "WarmupLR", "params": []}, "scheduler.params must be an object"),
        ({"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2}}, 'scheduler.params needs "total_num_steps"'),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "cannot be those of WarmupLR: .*positive"),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": "x"}}, "cannot be those of WarmupLR"),
    ],
)
def test_a_schedule_is_complete(section, words):
    with pytest.raises(UserError, match=words):
        check_deepspeed_config({**GOOD, "scheduler": section}, 1)


@pytest.mark.parametrize("changes", [{"zero_optimization": {"stage": 1}}, {"bf16": {"enabled": True}}])
def test_a_schedule_of_torchs_is_refused_where_deepspeed_cannot_make_it(changes):
    schedule = {"scheduler": {"type": "StepLR", "params": {"step_size": 2}}}
    check_deepspeed_config({**GOOD, **schedule}, 1)
    with pytest.raises(UserError, match="scheduler.type is StepLR, one of torch's, which DeepSpeed can make neither"):
        check_deepspeed_config({**GOOD, **schedule, **changes}, 1)


def test_an_optimizer_that_deepspeed_has_not_tested():
    with pytest.raises(UserError, match="zero_allow_untested_optimizer is false"):
        check_deepspeed_config({**GOOD, "zero_allow_untested_optimizer": False}, 1)


def test_a_seed_that_no_generator_takes():
    with pytest.raises(UserError, match="megalr.seed is a whole number of 22 digits: write one below"):
        MegalrConfig.from_json({**GOOD, "megalr": {"seed": 2**70}})
