"""How much state of a rule each rank keeps: as much in all as the paper says, spread evenly."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.covering import daily_and_slow
from tests.equality import batches, rule_case
from tests.references import REFERENCES
from tests.world.threads import world
from tests.world.training import engine_of

RANK, SIZE, INNER, LAYERS = 16, 64, 172, 4
RULES = [name for name, reference in REFERENCES.items() if reference.papers_floats(SIZE, SIZE, RANK) is not None]


@functools.cache
def llama() -> nn.Module:
    shape = {"hidden_size": SIZE, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=61))


def after_two_updates(case, stage):
    """Bytes of the rule's state on this rank; what the rule says of all; the routing table."""
    engine = engine_of(case, llama(), stage)
    for ids in batches(2):
        engine.backward(engine(input_ids=ids[:2], labels=ids[:2]).loss)
        engine.step()
    optimizer = engine.basic_optimizer
    kept = [t for state in optimizer.matrix_states.values() for t in state.values() if isinstance(t, Tensor)]
    said = sum(m.rule.state_bytes(m.shape) for m in optimizer.matrices.matrices)
    return sum(t.numel() * t.element_size() for t in kept), said, optimizer.routing_table()


@pytest.mark.parametrize(("type_name", "stage", "size"), daily_and_slow(RULES, (2, 3), turns=[(2, 4)]))
def test_state_by_rank(type_name, stage, size):
    needed = {key: value for key, value in REFERENCES[type_name].trained_with.items() if key in ("rank", "random_from")}
    params = needed | ({"rank": RANK} if "rank" in needed else {})
    case = replace(rule_case(type_name), optimizer={"type": type_name, "params": params}, megalr={})
    floats = REFERENCES[type_name].papers_floats
    total = 4 * LAYERS * (4 * floats(SIZE, SIZE, RANK) + 3 * floats(SIZE, INNER, RANK))
    results = world(size, after_two_updates, case, stage)
    kept = [result[0] for result in results]
    assert 0 <= sum(kept) - total <= 4 * 7 * LAYERS  # scalars
    assert max(kept) <= 1.15 * total / size
    for _, said, table in results:
        assert said == sum(kept)
        assert table.endswith("allow 1.00")
        assert f"largest {max(kept) * size / sum(kept):.2f} x the mean" in table
