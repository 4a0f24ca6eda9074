"""What an export calls a dense model is one: every weight of it, in its shape, and nothing else."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from megalr.checkpoint.export.command import export
from megalr.checkpoint.export.huggingface import fill, write_model
from megalr.errors import UserError
from megalr.layers import densify, parametrize
from megalr.layers.lora import LoraConfig
from tests import known_state
from tests.small_llama import small_llama


def test_parts_of_a_layer_that_belong_to_no_layer_are_not_called_dense():
    config = LoraConfig(rank=2, target_modules=("attn",))
    net = parametrize(nn.ModuleDict({"attn": nn.Linear(6, 6), "attn_out": nn.Linear(6, 6)}), config)
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "attn.weight"}
    with pytest.raises(UserError, match=r"attn.[AB] has no attn.weight beside it"):
        densify(state, config)
    own = {"mixer.A": torch.zeros(2), "mixer.weight": torch.zeros(2)}
    assert densify(own, config).keys() == own.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_held_against_the_model(tied):
    state = small_llama(tied=tied).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"

    def filled(weights):
        with torch.device("meta"):
            empty = small_llama(tied=tied)
        fill(empty, weights)
        return empty.state_dict()

    assert all(torch.equal(tensor, state[key]) for key, tensor in filled(dict(state)).items())
    with pytest.raises(UserError, match=rf"weights missing \['{name}'\], weights too many \[\]"):
        filled({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(UserError, match=r"weights too many \['layers.0.self_attn.q_proj.B'\]"):
        filled({**state, "layers.0.self_attn.q_proj.B": torch.zeros(2)})
    with pytest.raises(UserError, match=rf"{name} is \(2, 3\), and the dense model has \("):
        filled({**state, name: torch.zeros(2, 3)})


def untied_llama():
    """Its configuration ties the head to the embedding, and its program has given it a head of its own."""
    model = small_llama(tied=True)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert model.config.tie_word_embeddings
    return model.eval()


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=torch.arange(10).view(1, 10)).logits


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("form", "base"), [("hf", "."), ("peft", "base")])
def test_a_head_of_its_own_stays_whatever_the_configuration_ties(tmp_path, form, base):
    """A LoRA model whose B is zero has its base's logits."""
    model, section = untied_llama(), {"type": "lora", "rank": 2, "target_modules": ["attn"]}
    expected = logits_of(model)
    parametrize(model, LoraConfig(rank=2, target_modules=("attn",)))
    known_state.write_model(tmp_path / "checkpoints", model, section)

    export(tmp_path / "checkpoints", tmp_path / "out", form)

    found = LlamaForCausalLM.from_pretrained(tmp_path / "out" / base)
    assert not found.config.tie_word_embeddings
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(logits_of(found), expected)


def test_a_tied_head_stays_tied(tmp_path):
    """Both names may be given, with tensors of their own that are equal."""
    model = small_llama(tied=True)
    with torch.device("meta"):
        empty = small_llama(tied=True)
    write_model(empty, {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path, torch.float32)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_what_a_model_ties_without_its_configuration_is_refused():
    class Tying(LlamaForCausalLM):
        def tie_weights(self, *args, **kwargs):
            self.lm_head.weight = self.model.embed_tokens.weight

    with torch.device("meta"):
        empty = Tying(small_llama().config)
    with pytest.raises(UserError, match=r"transformers ties lm_head\.weight to another weight of Tying"):
        fill(empty, untied_llama().state_dict())


Q = "model.layers.0.self_attn.q_proj"
LORA = {"type": "lora", "rank": 2, "target_modules": ["q_proj"]}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("form", "dense", "part"),
    [
        ("hf", False, "model.norm.weight"),
        ("hf", False, f"{Q}.weight"),  # W0 + B A
        ("safetensors", True, f"{Q}.weight"),
        ("safetensors", False, f"{Q}.B"),
        ("peft", False, f"{Q}.A"),
        ("peft", False, "model.norm.weight"),
    ],
)
def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path, form, dense, part):
    model = small_llama()
    parametrize(model, LoraConfig(rank=2, target_modules=("q_proj",)))
    with torch.no_grad():
        model.get_parameter(part).view(-1)[:3] = torch.tensor([7e4, 1e-30, float("nan")])
    known_state.write_model(tmp_path / "checkpoints", model, LORA)
    words = rf"{part} has values of up to 7e\+04, and the largest float16 is 6.55e\+04.*`--dtype bfloat16` or"
    with pytest.raises(UserError, match=words):
        export(tmp_path / "checkpoints", tmp_path / "out", form, dtype="float16", dense=dense)
    assert not (tmp_path / "out").exists()
    export(tmp_path / "checkpoints", tmp_path / "out", form, dtype="bfloat16", dense=dense)


def test_what_a_launcher_exports_is_checked_as_well(tmp_path):
    model = small_llama()
    state = {**model.state_dict(), "model.norm.weight": torch.full_like(model.model.norm.weight, 3.4e38)}
    with torch.device("meta"):
        empty = small_llama()
    with pytest.raises(UserError, match=r"3.39e\+38. Export the checkpoint with `--dtype float32`"):
        write_model(empty, state, tmp_path, torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_a_product_that_is_not_finite_is_refused():
    config = LoraConfig(rank=2, target_modules=("q_proj",))
    model = parametrize(small_llama(), config)
    state = {name: torch.full_like(t, 3e38) if name.startswith(Q) else t for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"{Q}.weight, multiplied in torch.float32, is not finite"):
        densify(state, config)
    state[f"{Q}.B"][0, 0] = float("nan")
    assert not densify(state, config)[f"{Q}.weight"].isfinite().all()
