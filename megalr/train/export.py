"""From a trained engine to an ordinary Hugging Face model, checked against the model it came from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megalr.checkpoint.export.folder import OVERWRITE, check_output, output_folder, save_tokenizer
from megalr.checkpoint.export.huggingface import write_model
from megalr.config.settings import ParametrizationConfig
from megalr.errors import UserError
from megalr.hosts.tensor_parallel import joined
from megalr.layers import densify
from megalr.train.models import empty_model
from megalr.train.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Largest logit difference, relative to the largest logit, that rounding of weights and activations explains.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_export_folder(name: str, *, may_replace: bool, resumes: bool = False) -> Path:
    """The folder to export to, before a run starts.

    Args:
        name: of the folder.
        may_replace: whether an earlier export may be there.
        resumes: whether the run goes on, so that --overwrite is no advice.

    Raises:
        UserError: it is a file, holds something that is not to be replaced, or cannot be written.
    """
    path = Path(name).expanduser()
    otherwise = "move the export there away" if resumes else OVERWRITE
    check_output(path, may_replace=may_replace, flag="--export", otherwise=otherwise)
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not _is_writable(existing):
        raise UserError(f"--export {path}: nothing can be written in {existing}; name another folder")
    return path


def _is_writable(folder: Path) -> bool:
    # Tried, not asked: permissions do not tell of read-only and virtual file systems.
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@torch.no_grad()
def export_dense(
    engine: Any,
    tokenizer: PreTrainedTokenizerFast,
    parametrization: ParametrizationConfig,
    input_ids: Tensor,
    folder: Path,
    *,
    dtype: torch.dtype,
    ranks: Ranks,
) -> float:
    """Write the trained model with dense weights, read it back and compare logits. Collective.

    Args:
        engine: of a transformers LLaMA.
        tokenizer: saved beside the model.
        parametrization: what the model was trained with.
        input_ids: (sequences, L) tokens to compare on, the same on every rank.
        folder: where to write.
        dtype: of the written weights, that of training.
        ranks: this process among the others.

    Returns:
        The largest absolute difference of a logit, on every rank.

    Raises:
        UserError: the difference is larger than rounding explains.
    """
    from megalr.api import consolidated_state_dict  # noqa: PLC0415  (train/ is imported without DeepSpeed)

    training = engine.training
    engine.eval()
    expected: Tensor = engine(input_ids=input_ids.to(ranks.device)).logits
    if expected.shape[-1] < engine.module.config.vocab_size:  # a head that is cut by vocabulary
        expected = joined(expected, -1).to(ranks.device)
    engine.train(training)
    state = consolidated_state_dict(engine)

    def write_and_compare() -> float:
        assert state is not None
        config = engine.module.config
        model = empty_model(type(config).from_dict({**config.to_dict(), "use_cache": True}))
        with output_folder(folder) as part:
            write_model(model, densify(state, parametrization), part, dtype)
            save_tokenizer(tokenizer, part)
        return _largest_difference(folder, input_ids, expected, dtype, ranks.device)

    return ranks.from_first(write_and_compare)


def _largest_difference(
    folder: Path, input_ids: Tensor, expected: Tensor, dtype: torch.dtype, device: torch.device
) -> float:
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    logits = model.to(device).eval()(input_ids=input_ids.to(device)).logits
    difference: float = (logits.float() - expected.float()).abs().max().item()
    # Under torch_autocast weights are fp32, and logits are not computed in it.
    allowed = max(_TOLERANCE[dtype], _TOLERANCE[expected.dtype]) * expected.float().abs().max().item()
    if not difference <= allowed:
        raise UserError(
            f"the exported model's logits differ from the trained model's by {difference:.2g}, more than the "
            f"{allowed:.2g} that rounding explains: do not use {folder}"
        )
    return difference
