"""Peak speeds of GPUs in dense matrix products, by the name that torch gives the device."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Peak:
    """TFLOP/s of one device as torch counts devices, without sparsity; None where the hardware lacks the dtype.

    Attributes:
        fp16, bf16: of these dtypes.
        tf32: fp32 numbers multiplied as TF32, in use where ``torch.get_float32_matmul_precision()`` is not "highest".
        fp32: fp32.
    """

    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


# The first pattern that matches the whole name counts. Shares of a GPU (MIG) match none, nor do GPUs that are not here.
# Vendors print several of these numbers with 2:4 sparsity, which is twice the dense one.
PEAKS: tuple[tuple[str, Peak], ...] = (
    # NVIDIA Tesla V100 datasheet, January 2020: 125 (SXM2), 112 (PCIe), 130 (V100S); fp32 15.7, 14, 16.4.
    (r"Tesla V100-SXM[23]-\d+GB(-LS)?", Peak(fp16=125.0, bf16=None, tf32=None, fp32=15.7)),
    (r"Tesla V100-PCIE-\d+GB", Peak(fp16=112.0, bf16=None, tf32=None, fp32=14.0)),
    (r"Tesla V100S-PCIE-32GB", Peak(fp16=130.0, bf16=None, tf32=None, fp32=16.4)),
    # NVIDIA A100 datasheet, June 2021: all forms alike.
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB", Peak(fp16=312.0, bf16=312.0, tf32=156.0, fp32=19.5)),
    (r"NVIDIA A100 80GB PCIe", Peak(fp16=312.0, bf16=312.0, tf32=156.0, fp32=19.5)),
    # NVIDIA L40S datasheet, 2023.
    (r"NVIDIA L40S", Peak(fp16=362.05, bf16=362.05, tf32=183.0, fp32=91.6)),
    # NVIDIA H100 datasheet, SXM, PCIe and NVL; half of what it prints with sparsity. Grace Hopper has the SXM's.
    (r"NVIDIA H100 PCIe", Peak(fp16=756.0, bf16=756.0, tf32=378.0, fp32=51.0)),
    (r"NVIDIA H100 NVL", Peak(fp16=835.5, bf16=835.5, tf32=417.5, fp32=60.0)),
    (r"NVIDIA (H100( SXM\d?)?( 80GB HBM3)?|GH200 \w+)", Peak(fp16=989.4, bf16=989.4, tf32=494.7, fp32=66.9)),
    # NVIDIA H200 datasheet, SXM and NVL; half of what it prints with sparsity.
    (r"NVIDIA H200 NVL", Peak(fp16=835.5, bf16=835.5, tf32=417.5, fp32=60.0)),
    (r"NVIDIA H200", Peak(fp16=989.4, bf16=989.4, tf32=494.7, fp32=66.9)),
    # NVIDIA Blackwell datasheet, "individual GPU" of HGX B200 and GB200 NVL72; half of what it prints with sparsity.
    (r"NVIDIA B200", Peak(fp16=2250.0, bf16=2250.0, tf32=1100.0, fp32=75.0)),
    (r"NVIDIA GB200", Peak(fp16=2500.0, bf16=2500.0, tf32=1250.0, fp32=80.0)),
    # AMD Instinct MI250X data sheet: 383 and (matrix) 95.7 for a card, whose two dies are two devices.
    (r"AMD Instinct MI250X.*", Peak(fp16=191.5, bf16=191.5, tf32=None, fp32=47.9)),
    # AMD Instinct MI300X data sheet.
    (r"AMD Instinct MI300X.*", Peak(fp16=1307.4, bf16=1307.4, tf32=653.7, fp32=163.4)),
)


def peak_tflops(name: str, dtype: torch.dtype, *, precision: str = "highest") -> float | None:
    """The peak of a device in dense matrix products.

    Args:
        name: of the device, ``torch.cuda.get_device_name()``.
        dtype: that the model computes in.
        precision: ``torch.get_float32_matmul_precision()``, which decides how fp32 numbers are multiplied.

    Returns:
        TFLOP/s; None for a device that is not in the table, or a dtype that it lacks.
    """
    peak = next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)
    if peak is None:
        return None
    if dtype == torch.float32:
        return peak.fp32 if precision == "highest" or peak.tf32 is None else peak.tf32
    return {torch.float16: peak.fp16, torch.bfloat16: peak.bf16}.get(dtype)


def peak_of_device(device: torch.device, dtype: torch.dtype) -> float | None:
    """:func:`peak_tflops` of a device of this process; None for a CPU, whose peak nobody knows."""
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), dtype, precision=torch.get_float32_matmul_precision())
