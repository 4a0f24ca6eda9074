"""What 8 and 4 bits keep: codes, packing, odd sizes, and errors no larger than the codes allow."""

import inspect
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megalr.rules.galore import GaLore
from megalr.rules.q_galore import QGaLore
from megalr.rules.quantization import (
    _code_book,
    blocks_of,
    dequantize_blocks,
    dequantize_groups,
    groups_of,
    quantize_blocks,
    quantize_groups,
)
from tests.references.q_galore import dynamic_codes, eight_bits, four_bits

SHAPES = [(1, 1), (1, 7), (7, 1), (16, 16), (3, 85), (5, 103), (32, 40)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_keep_the_nearest_code(shape, signed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    values = values if signed else values.abs()
    codes, largest = quantize_blocks(values, signed=signed)
    assert codes.dtype == torch.uint8 and codes.shape == shape and len(largest) == blocks_of(values.numel())
    kept = dequantize_blocks(codes, largest, signed=signed)
    expected = eight_bits(values.double(), dynamic_codes(signed))
    torch.testing.assert_close(kept, expected.float())
    # A second time nothing changes: the largest entry stays, or is the highest code below it.
    if not signed:
        again = dequantize_blocks(*quantize_blocks(kept, signed=signed), signed=signed)
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize("signed", [True, False])
def test_all_codes_come_back(signed):
    book = dynamic_codes(signed).float()
    codes, largest = quantize_blocks(book, signed=signed)
    assert codes.tolist() == list(range(256)) and largest.tolist() == [1.0]
    assert torch.equal(dequantize_blocks(codes, largest, signed=signed), book)


def test_zeros_stay_zeros():
    codes, largest = quantize_blocks(torch.zeros(3, 100), signed=True)
    assert not dequantize_blocks(codes, largest, signed=True).any()
    assert not dequantize_blocks(torch.zeros(3, 100, dtype=torch.uint8), torch.zeros(2), signed=False).any()
    assert not dequantize_groups(*quantize_groups(torch.zeros(3, 100)), (3, 100)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_keep_the_nearest_level(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, step, zero = quantize_groups(values)
    assert packed.dtype == zero.dtype == torch.uint8
    assert len(packed) == -(-values.numel() // 2) and len(step) == len(zero) == groups_of(values.numel())
    kept = dequantize_groups(packed, step, zero, shape)
    torch.testing.assert_close(kept, four_bits(values.double()).float())


def test_four_bits_are_within_a_step():
    values = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0]
    packed, step, zero = quantize_groups(values)
    assert (dequantize_groups(packed, step, zero, (64, 16)) - values).abs().max() <= step.max()


def test_a_subclass_with_a_state_of_its_own_is_nothing_that_galore_goes_on_with():
    @dataclass(frozen=True, kw_only=True)
    class Other(QGaLore):
        name: ClassVar[str] = "other"

    assert QGaLore(rank=4).logical_form() == GaLore(rank=4).logical_form()
    assert QGaLore(rank=4, queue_size=3).logical_form() == QGaLore(rank=4, min_8bit_size=0).logical_form()
    assert QGaLore(rank=4).logical_form() != GaLore(rank=5).logical_form()
    assert Other(rank=4).logical_form() == Other(rank=4).form()
    assert Other(rank=4).form()["rule"] == "other"


@pytest.mark.parametrize(
    "place", [lambda: FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode, lambda: torch.device("meta")]
)
def test_codes_made_elsewhere_are_not_kept(place):
    """The table of codes is the same for all matrices, so it is made once."""
    inspect.getclosurevars(_code_book).nonlocals["found"].clear()
    values = torch.linspace(-1, 1, 300)
    with place():
        dequantize_blocks(*quantize_blocks(values, signed=True), signed=True)
    again = dequantize_blocks(*quantize_blocks(values, signed=True), signed=True)
    assert type(again) is torch.Tensor and not again.is_inference()
    torch.testing.assert_close(again, eight_bits(values.double(), dynamic_codes(True)).float())
    assert _code_book(True, values.device) is _code_book(True, values.device)
