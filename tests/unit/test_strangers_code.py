"""What a folder names is not run: plugins, code beside a model, kernels, pickles."""

import json
import pickle
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalr.checkpoint.__main__ import main
from megalr.checkpoint.export.huggingface import empty_model_of
from megalr.checkpoint.manifest import Manifest
from megalr.config.settings import MegalrConfig
from megalr.data.tokenizer import load_tokenizer
from megalr.errors import UserError
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.train import score
from megalr.train.checkpoints import find_checkpoint
from megalr.train.models import config_from_dict, read_model_config
from megalr.train.run_folder import RunFolder
from tests import known_state

# There is no group: a process is alone, as torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LAYERS = """
from dataclasses import dataclass
from pathlib import Path
import megalr
from megalr.layers.low_rank import LowRankConfig

Path({marker!r}).touch()

@megalr.register_parametrization("strange")
@dataclass(frozen=True, kw_only=True)
class Strange(LowRankConfig):
    pass
"""


@pytest.fixture
def plugin(tmp_path):
    """A plugin that leaves a trace when it is imported, and the trace; its name is forgotten at the end."""
    path, marker = tmp_path / "strange layers.py", tmp_path / "it was run"
    path.write_text(LAYERS.format(marker=str(marker)))
    yield path, marker
    PARAMETRIZATIONS.pop("strange", None)


def model_of(section):
    """A parametrized LLaMA, before it is trained."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return score.parametrize(model, MegalrConfig.from_json({"megalr": {"parametrization": section}}).parametrization)


def run_of(folder, section, plugins, optimizer="AdamW"):
    """The folder of a run with one checkpoint, as pretrain.py writes it, whose JSON names plugins."""
    shown = {"type": "low_rank", "rank": 4} if section["type"] == "strange" else section
    state = {f"weights/{k}": known_state.Entry.of(v) for k, v in model_of(shown).state_dict().items()}
    config = {
        "optimizer": {"type": optimizer},
        "megalr": {"parametrization": section, "plugins": plugins},
        "train_micro_batch_size_per_gpu": 1,
    }
    required = {"model": {}, "megalr.parametrization": section}
    notes = {"step": 1, "tokens": 9, "required": required, "settings": {"megalr": {"plugins": plugins}}}
    document = {**known_state.document(1), "config": {"megalr": config["megalr"]}, "client": {"run": notes, "data": {}}}
    known_state.write_entries(folder / "checkpoints", "step1", document, state, {}, keep=None, asynchronous=False)
    text = {"dataset": "austen", "tokenizer": None, "sequence_length": 8, "pack": True}
    settings = {"deepspeed": config, "model": LlamaConfig(**SHAPE).to_dict(), "data": text}
    (folder / "run.json").write_text(json.dumps(settings))
    return folder


def test_a_folders_plugins_are_named_and_not_run(tmp_path, plugin, capsys):
    """Whoever reads the folder; what the command line names is imported, and is then all that it takes."""
    path, marker = plugin
    run = run_of(tmp_path / "run", {"type": "strange", "rank": 4}, [str(path), "no_such_module"])
    words = f"It names the plugins '{path}' no_such_module. A plugin is code that runs with your rights"
    flag = f"add --plugins '{path}' no_such_module"
    for folder in (run, run / "checkpoints" / "step1"):
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            score.load_scored(folder)
        assert flag in str(caught.value) and '"strange", which neither megalr' in str(caught.value)
    to = ["export", str(run / "checkpoints"), "--to", "safetensors", str(tmp_path / "out")]
    assert main(to) == 2
    assert words in capsys.readouterr().err
    for command in ("inspect", "verify"):
        assert main([command, str(run / "checkpoints")]) == main([command, str(run / "checkpoints/step1")]) == 0
    assert find_checkpoint(RunFolder(run)).notes.step == 1  # what --resume reads of a folder
    assert not marker.exists()
    assert main([*to, "--plugins", str(path)]) == 0
    assert marker.exists()
    assert score.load_scored(run).model.lm_head.weight.shape == (64, 16)


def test_a_plugin_that_is_not_needed_is_not_asked_for(tmp_path, plugin):
    """As where it brought the rule, of which a score knows nothing."""
    path, marker = plugin
    run = run_of(tmp_path / "run", {"type": "low_rank", "rank": 4}, [str(path)], optimizer="Strange")
    expected = model_of({"type": "low_rank", "rank": 4}).state_dict()
    found = score.load_scored(run).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not marker.exists()


@pytest.mark.parametrize("named", [None, [], "x.py", 3, [3]])
def test_a_folder_that_names_no_plugin(tmp_path, named):
    run = run_of(tmp_path / "run", {"type": "strange", "rank": 4}, named)
    with pytest.raises(UserError, match="and names no plugin: if you have the plugin, add --plugins"):
        score.load_scored(run)


def test_what_a_message_shows_does_not_write_to_the_terminal(tmp_path):
    run = run_of(tmp_path / "run", {"type": "strange", "rank": 4}, ["a\x1b[2Jb\r"])
    with pytest.raises(UserError) as caught:
        score.load_scored(run)
    assert str(caught.value).isprintable() and r"a\x1b[2Jb\r" in str(caught.value)


def test_the_flags_name_plugins():
    assert score.parse_score_arguments(["DIR", "--plugins", "a.py", "b"]).plugins == ("a.py", "b")
    assert score.parse_score_arguments(["DIR"]).plugins == ()


def exported(folder, **changes):
    """An exported model whose configuration says more than a model's does, with code beside it."""
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    marker = folder / "it was run"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    return marker


CODE = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", "code.T"]}


@pytest.mark.parametrize("kind", ["llama", "strange"])
def test_code_beside_an_export_is_not_run(tmp_path, kind, monkeypatch):
    """Nor is anybody asked whether it may: transformers waits for an answer of its own accord."""
    monkeypatch.setattr("builtins.input", lambda words: "y")
    marker = exported(tmp_path, auto_map=CODE, model_type=kind)
    if kind == "llama":
        assert type(score.load_scored(tmp_path, tokenizer="a name").model) is LlamaForCausalLM  # which needs no code
    else:
        with pytest.raises(UserError, match="without code or pickles that come with it"):
            score.load_scored(tmp_path, tokenizer="a name")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": CODE}))
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))
    assert not marker.exists()


def test_a_pickle_is_not_read(tmp_path, monkeypatch):
    class Run:
        def __reduce__(self):
            return (open, (str(tmp_path / "it was run"), "w"))

    exported(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Run()))
    monkeypatch.setattr(torch, "load", pickle.load)
    with pytest.raises(UserError, match="with their weights in safetensors"):
        score.load_scored(tmp_path, tokenizer="a name")
    assert not (tmp_path / "it was run").exists()


def test_a_kernel_that_a_configuration_names_is_not_fetched(tmp_path):
    kernel = {"attn_implementation": "kernels-community/strange"}
    assert config_from_dict(SHAPE | kernel)._attn_implementation == "sdpa"
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | kernel))
    assert read_model_config(str(tmp_path / "config.json"), tmp_path)._attn_implementation == "sdpa"
    found = empty_model_of(manifest_of(tmp_path, architectures=["LlamaForCausalLM"], **kernel))
    assert found.config._attn_implementation == "eager"


def manifest_of(folder, **model):
    state = model_of({"type": "full"}).state_dict()
    tensors = {f"weights/{key}": {"shape": list(tensor.shape)} for key, tensor in state.items()}
    return Manifest(folder, {"model": {"model_type": "llama", **SHAPE, **model}, "tensors": tensors})


@pytest.mark.parametrize(
    "names", [["Trainer"], ["pipeline"], ["BertForMaskedLM"], ["__doc__"], ["PreTrainedModel"], [3], [], None, "", [[]]]
)
def test_a_model_is_of_a_class_of_models(tmp_path, names):
    """Not of whatever else transformers has under that name."""
    assert type(empty_model_of(manifest_of(tmp_path, architectures=names))) is LlamaForCausalLM


def test_a_model_that_needs_code_of_its_own_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda words: "y")
    strange = manifest_of(tmp_path, model_type="strange", auto_map=CODE, architectures=["M"])
    with pytest.raises(UserError, match="this transformers cannot build the strange that was saved"):
        empty_model_of(strange)
