"""An export for which the disk has no room ends with a sentence, and an earlier export stays as it was."""

from __future__ import annotations

import pytest
import safetensors.torch
import transformers.modeling_utils
from safetensors import SafetensorError

from megalr.checkpoint.__main__ import main
from megalr.checkpoint.export.folder import output_folder, save_tokenizer
from megalr.data.tokenizer import EMBEDDED_TOKENIZER, load_tokenizer
from megalr.errors import UserError
from megalr.layers import parametrize
from megalr.layers.lora import LoraConfig
from tests import known_state
from tests.small_llama import small_llama

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FULL = "I/O error: No space left on device (os error 28)"


@pytest.fixture
def checkpoint(tmp_path):
    model = parametrize(small_llama(), LoraConfig(rank=2, target_modules=("attn",)))
    section = {"type": "lora", "rank": 2, "target_modules": ["attn"]}
    return str(known_state.write_model(tmp_path / "checkpoints", model, section))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["hf", "peft", "safetensors"])
def test_a_full_disk_is_said(checkpoint, tmp_path, monkeypatch, capsys, form):
    out = tmp_path / "out"
    argv = ["export", checkpoint, str(out), "--to", form, "--overwrite"]
    assert main(argv) == 0
    before = contents(out)

    def save(*args, **kwargs):
        raise SafetensorError(FULL)  # is no OSError

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save)
    assert main(argv) == 2
    assert f"error: {out} cannot be written: {FULL}" in capsys.readouterr().err
    assert contents(out) == before


def test_no_room_for_a_tokenizer_is_said(checkpoint, tmp_path, capsys):
    tokenizer, folder = load_tokenizer(str(EMBEDDED_TOKENIZER)), tmp_path / "out"
    with (
        pytest.raises(UserError, match=r"out cannot be written: .*No space left on device"),
        output_folder(folder) as part,
    ):
        (part / "tokenizer.json").symlink_to("/dev/full")
        save_tokenizer(tokenizer, part)
    assert not folder.exists()


def test_other_errors_of_a_tokenizer_are_its_own(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise LookupError("it is broken")

    with pytest.raises(LookupError, match="it is broken"), output_folder(tmp_path / "out") as part:
        save_tokenizer(Tokenizer(), part)
