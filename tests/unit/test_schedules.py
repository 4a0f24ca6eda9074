"""Learning-rate schedules through a checkpoint's JSON: torch's and DeepSpeed's go on at the rate they had."""

import json
from collections import Counter

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupLR
from torch.optim import lr_scheduler as schedules

from megalr.checkpoint.schedules import check_schedule, goes_on, schedule_numbers, set_schedule
from megalr.errors import UserError

BEFORE, AFTER = 4, 12


def sequence(optimizer):
    parts = [schedules.LinearLR(optimizer, total_iters=3), schedules.MultiStepLR(optimizer, [2, 5])]
    return schedules.SequentialLR(optimizer, parts, [3])


SCHEDULES = {
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [3, 6, 6]),
    "SequentialLR": sequence,
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]
    ),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "WarmupCosineLR": lambda o: WarmupCosineLR(o, total_num_steps=20, warmup_num_steps=6),
}


def schedule(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    return optimizer, SCHEDULES[kind](optimizer)


def rates(optimizer, made, steps):
    found = []
    for _ in range(steps):
        optimizer.step()
        made.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rates_go_on_as_they_would_have(kind):
    optimizer, made = schedule(kind)
    rates(optimizer, made, BEFORE)
    written = json.dumps(schedule_numbers(made))
    rate, expected = optimizer.param_groups[0]["lr"], rates(optimizer, made, AFTER)
    assert len(set(expected)) > 1
    optimizer, again = schedule(kind)
    numbers = json.loads(written)
    assert numbers["type"] == kind
    assert goes_on(again, numbers, same_groups=True)
    check_schedule(again, numbers)
    set_schedule(again, numbers, same_groups=True)
    optimizer.param_groups[0]["lr"] = rate  # which a checkpoint has of the optimizer
    assert rates(optimizer, again, AFTER) == expected
    assert again.state_dict().keys() == made.state_dict().keys()


def test_values_come_back_in_their_types():
    _, made = schedule("MultiStepLR")
    _, again = schedule("MultiStepLR")
    again.milestones = Counter()
    set_schedule(again, json.loads(json.dumps(schedule_numbers(made))), same_groups=True)
    assert again.milestones == Counter({3: 1, 6: 2})
    assert isinstance(again.milestones, Counter)


def test_another_schedule_does_not_go_on():
    _, step = schedule("MultiStepLR")
    warmup = WarmupLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    _, cosine = schedule("WarmupCosineLR")
    _, factor = schedule("LambdaLR")
    product = schedules.MultiplicativeLR(factor.optimizer, lambda step: 0.9)
    assert product.state_dict().keys() == factor.state_dict().keys()
    for one, other in ((warmup, step), (step, warmup), (None, step), (step, None), (product, factor)):
        assert not goes_on(one, schedule_numbers(other), same_groups=True)
    assert not goes_on(step, schedule_numbers(step), same_groups=False)
    assert goes_on(None, None, same_groups=True)
    assert goes_on(cosine, schedule_numbers(warmup), same_groups=False)  # both are at an iteration


def test_what_json_cannot_hold_is_named():
    _, made = schedule("MultiStepLR")
    made.base_lrs = [torch.ones(1)]
    with pytest.raises(UserError, match=r"MultiStepLR.base_lrs is a Tensor, which JSON cannot hold"):
        schedule_numbers(made)
