"""Every rule under every way of cutting its matrices, against one plain process, and going on from a save."""

from __future__ import annotations

import functools

import pytest
import torch

from megalr.config.settings import MegalrConfig
from megalr.layout.planned import planned_layout
from tests.covering import daily_and_slow
from tests.equality import ACCUMULATIONS, STAGES, UPDATES, WORLDS, Case, assert_equal, rule_case
from tests.references import REFERENCES
from tests.world.training import WAYS, train

RULES = list(REFERENCES)


@functools.cache
def case_of(type_name: str) -> Case:
    return rule_case(type_name)


def calls_of(case: Case) -> int:
    """Matrices that are updated in a run, each once for each update."""
    rule = MegalrConfig.from_json({"optimizer": dict(case.optimizer)}).optimizer.rule
    if rule is None:
        return 0
    params, model = case.optimizer["params"], case.model()
    ends = [("lm_head", params.get("head")), ("embed_tokens", params.get("embeddings"))]
    patterns = [*params["target_modules"], *(name for name, chosen in ends if chosen)]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim > 1 and any(t in n for t in patterns)}
    names = list(planned_layout([shapes], stage=0, world_size=1).matrices(shapes).shapes)
    return sum(len(names) - len(rule.resting(names, t, 0)) for t in range(case.updates))


@pytest.mark.parametrize(
    ("type_name", "stage", "size", "accumulation", "resume"),
    daily_and_slow(RULES, STAGES, WORLDS, ACCUMULATIONS, WAYS),
)
def test_equals_one_plain_process_and_resumes_bitwise(type_name, stage, size, accumulation, resume):
    case = case_of(type_name)
    ranks = train(case, stage, size, accumulation, resume=resume)
    assert_equal(ranks[0].weights, case.expected, case.bound)
    for rank in ranks:
        assert rank.lost == []
        assert all(torch.equal(rank.weights[name], w) for name, w in ranks[0].weights.items())
        assert rank.updates == UPDATES
    # The rule really ran: once for each active matrix and update, over all ranks; at stage 0 on each of them.
    calls, once = [rank.calls for rank in ranks], calls_of(case)
    assert calls == [once] * size if stage == 0 else sum(calls) == once
