"""An exported model is compared with the trained one, as exactly as this one computes."""

from __future__ import annotations

import pytest
import torch

from megalr.errors import UserError
from megalr.train.export import _largest_difference
from tests.small_llama import VOCABULARY, small_llama


@pytest.fixture
def exported(tmp_path):
    model = small_llama().eval()
    model.save_pretrained(tmp_path)
    return model, torch.arange(12).view(2, 6) % VOCABULARY, tmp_path


def compared(exported, expected):
    _, ids, folder = exported
    return _largest_difference(folder, ids, expected, torch.float32, torch.device("cpu"))


def test_logits_of_autocast_are_compared_as_bf16(exported):
    model, ids, _ = exported
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids).logits
    assert logits.dtype is torch.bfloat16
    assert compared(exported, logits) > 1e-4 * logits.abs().max()


def test_logits_of_fp32_are_compared_as_fp32(exported):
    model, ids, _ = exported
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert compared(exported, logits) <= 1e-6
    with pytest.raises(UserError, match="do not use"):
        compared(exported, logits.to(torch.bfloat16).float())
