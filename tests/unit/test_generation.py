"""Updates and loads begin a new generation of weights, which ends what layers keep between calls."""

import torch
from torch import nn

import megalr
from megalr.generation import generation


def test_an_update_and_a_load_begin_a_generation():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = megalr.build_optimizer(model, {"optimizer": {"type": "AdamW"}})
    seen = [generation()]
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    seen.append(generation())
    optimizer.load_state_dict(optimizer.state_dict())
    seen.append(generation())
    assert len(set(seen)) == 3
