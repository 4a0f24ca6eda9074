"""``python -m megalr.checkpoint`` on checkpoints that engines of several processes have written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import megalr
from megalr.checkpoint.__main__ import main
from megalr.config.settings import MegalrConfig
from megalr.data.tokenizer import EMBEDDED_TOKENIZER
from megalr.layers import densify
from tests import processes
from tests.deepspeed import rule_training
from tests.deepspeed.tool_training import CASES, UPDATES, model_of

pytestmark = pytest.mark.distributed
MODULE = "tests.deepspeed.tool_training"
TAG = f"step{UPDATES}"
# Case: tensor-parallel ranks, processes, stage.
LAYOUTS = {
    "low-rank": (1, 2, 3),
    "SLTrain": (2, 2, 1),
    "projected": (1, 2, 2),
    "LoRA": (1, 2, 3),
    "GaLore": (2, 4, 3),
    "ReLoRA": (1, 2, 1),
    "CoLA": (1, 1, 0),
}
DAILY = ("low-rank", "SLTrain", "projected", "LoRA")
EXPORTED = [pytest.param(case, marks=[] if case in DAILY else [pytest.mark.slow]) for case in LAYOUTS if case != "CoLA"]


@pytest.fixture(scope="module")
def made(ranks, tmp_path_factory):
    """A case's directory of checkpoints, consolidated weights and logits; made once."""
    done = {}

    def make(case):
        if case not in done:
            folder = tmp_path_factory.mktemp("checkpoints") / case
            tensor, processes, stage = LAYOUTS[case]
            done[case] = (folder, *ranks(processes).run(f"{MODULE}:make", case, tensor, stage, str(folder))[0])
        return done[case]

    return make


@pytest.fixture(scope="module")
def odd(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, ranks(2).run(f"{MODULE}:make_odd", 3, str(folder), ["first", "second"])[0]


def run(capsys, *argv):
    """Exit code, output and errors."""
    code = main([str(each) for each in argv])
    return code, *capsys.readouterr()


def dense_of(case, state):
    return densify(state, MegalrConfig.from_json({"megalr": CASES[case][1]}).parametrization)


def is_half(case):
    return "bf16" in CASES[case][3]


def assert_same_model(model, expected, dtype):
    found = model.state_dict()
    assert {name for name in found if name not in expected} <= {"lm_head.weight"}
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=rule_training.batches(1)[0][:2]).logits.float()


def assert_same_logits(found, expected, case):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=(5e-2 if is_half(case) else 1e-5) * scale)


@pytest.mark.parametrize("case", EXPORTED)
def test_a_hugging_face_model_is_the_engines(made, case, tmp_path, capsys):
    folder, state, logits = made(case)

    code, output, _ = run(capsys, "export", folder / TAG, "--to", "hf", tmp_path / "out")

    assert code == 0
    assert str(tmp_path / "out") in output
    dtype = torch.bfloat16 if is_half(case) else torch.float32
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.use_cache
    assert_same_model(model, dense_of(case, state), dtype)
    assert_same_logits(logits_of(model), logits, case)


@pytest.mark.parametrize("case", EXPORTED)
def test_weights_as_they_were_trained_fit_the_parametrized_model(made, case, tmp_path, capsys):
    folder, state, logits = made(case)

    assert run(capsys, "export", folder, "--to", "safetensors", tmp_path, "--dtype", "float32")[0] == 0

    path = tmp_path / "model.safetensors"
    model = megalr.parametrize(model_of(case), {"megalr": CASES[case][1]})
    missing, unexpected = load_model(model, path)
    assert not missing and not unexpected
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, state[name].float() if tensor.is_floating_point() else state[name]), name
    assert_same_logits(logits_of(model), logits, case)
    with safe_open(path, framework="pt") as file:
        section = CASES[case][1].get("parametrization", {"type": "full"})
        assert json.loads(file.metadata()["parametrization"]) == section


@pytest.mark.parametrize("case", [pytest.param("LoRA"), pytest.param("ReLoRA", marks=pytest.mark.slow)])
def test_adapters_and_their_base_make_up_the_model(made, case, tmp_path, capsys):
    """As peft adds them: y = x W0^T + (alpha / r) (x A^T) B^T, in the layers whose names end with a target's."""
    folder, state, logits = made(case)

    assert run(capsys, "export", folder, "--to", "peft", tmp_path / "out", "--dtype", "float32")[0] == 0

    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    adapters = load_file(tmp_path / "out/adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    for name, layer in base.named_modules():
        if name.rpartition(".")[2] in config["target_modules"]:
            b, a = (adapters.pop(f"base_model.model.{name}.lora_{factor}.weight") for factor in "BA")
            layer.weight.data += config["lora_alpha"] / config["r"] * (b @ a)
    assert not adapters
    assert config["lora_alpha"] == CASES[case][1]["parametrization"].get("alpha", 4)
    for name, tensor in dense_of(case, state).items():
        torch.testing.assert_close(base.state_dict()[name], tensor.float())
    assert_same_logits(logits_of(base), logits, case)


@pytest.mark.parametrize("case", [pytest.param("LoRA"), pytest.param("ReLoRA", marks=pytest.mark.slow)])
def test_peft_reads_the_adapters(made, case, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    folder, _, logits = made(case)

    assert run(capsys, "export", folder, "--to", "peft", tmp_path / "out", "--dtype", "float32")[0] == 0

    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_logits(logits_of(model), logits, case)


def test_a_model_that_is_none_of_transformers(odd, tmp_path, capsys):
    """Stacks of matrices get their shape back; a tied head is written once, and named."""
    folder, state = odd

    code, _, errors = run(capsys, "export", folder, "--to", "hf", tmp_path / "hf")
    assert code == 2
    assert "--to safetensors --dense" in errors
    assert not (tmp_path / "hf").exists()

    assert run(capsys, "export", folder, tmp_path, "--to", "safetensors", "--dense")[0] == 0
    found = load_file(tmp_path / "model.safetensors")
    assert any(tensor.ndim == 3 for tensor in found.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    model = rule_training.odd_model(tied=True)
    assert load_model(model, tmp_path / "model.safetensors") == (set(), [])
    model.load_state_dict(state)  # what layers share is there under each name


def test_verify_names_the_file_and_the_parameter(odd, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(odd[0], folder)
    code, output, _ = run(capsys, "verify", folder)
    assert code == 0
    assert output.count("is whole") == 2
    size = sum(path.stat().st_size for path in (folder / "second").glob("*.safetensors"))
    assert f"{size:,} bytes of 2 files were read" in output

    content = json.loads((folder / "second/manifest.json").read_text())["content"]
    *_, file, begin, _ = content["tensors"]["weights/mlp_square.weight"]["pieces"][0]
    flip(folder / "second" / file, begin + 3)

    code, output, _ = run(capsys, "verify", folder / "second")
    assert code == 1
    assert file in output
    assert "mlp_square.weight" in output
    assert "is whole" not in output
    code, output, _ = run(capsys, "verify", folder)
    assert code == 1
    assert f"{folder / 'first'} is whole" in output

    code, _, errors = run(capsys, "export", folder / "second", "--to", "safetensors", tmp_path / "out")
    assert code == 2
    assert "mlp_square.weight" in errors
    assert f'in {folder} the newest that is whole is "first"' in errors
    assert not (tmp_path / "out").exists()

    code, output, errors = run(capsys, "export", folder, "--to", "safetensors", tmp_path / "out")
    assert code == 0
    assert "passed over" in errors
    assert f"{folder / 'first'} (1 updates)" in output


def test_damage_that_is_seen_without_reading(odd, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(odd[0], folder)
    (folder / "logs").mkdir()
    (folder / ".third.part").mkdir()
    (folder / "first/rank-00001.safetensors").unlink()
    (folder / "second/manifest.json").write_text("{}")

    code, output, _ = run(capsys, "inspect", folder)

    first, second = output.splitlines()
    assert code == 0
    assert first.startswith("first ") and "rank-00001.safetensors is missing" in first
    assert second.startswith("second  latest") and "damaged" in second
    assert run(capsys, "verify", folder)[0] == 1
    assert run(capsys, "verify", folder / "second")[0] == 1
    (folder / "second/manifest.json").unlink()
    code, _, errors = run(capsys, "export", folder / "second", "--to", "safetensors", tmp_path / "out")
    assert code == 2
    assert "never finished" in errors and "no other is whole" in errors


def test_inspect_several(odd, capsys):
    code, output, _ = run(capsys, "inspect", odd[0])

    newest, older = output.splitlines()
    assert code == 0
    assert newest.startswith("second  latest  2 updates, ") and "stage 3, 2 processes, float32" in newest
    assert older.startswith("first           1 updates, ")
    assert "damaged" not in output
    code, _, errors = run(capsys, "inspect", odd[0], "--tensors")
    assert code == 2
    assert str(odd[0] / "second") in errors


def test_inspect_one(made, capsys):
    folder, state, _ = made("SLTrain")

    code, output, _ = run(capsys, "inspect", folder / TAG)

    assert code == 0
    lines = {line.split("  ")[0]: line for line in output.splitlines()}
    assert lines["updates"].endswith(f" {UPDATES}")
    assert f"torch {torch.__version__}" in lines["by"]
    assert "stage 1, 2 processes, 2 of them tensor-parallel, float32" in lines["layout"]
    assert "LlamaForCausalLM (llama)" in lines["model"]
    assert "AdamW: lr 0.003" in lines["optimizer"]
    assert "sltrain: rank 5, density 0.1" in lines["parametrization"]
    assert "interval 7" in lines["refactorization"]
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    assert f"{sum(t.numel() for t in floats.values()):,} parameters in {len(floats)} tensors" in lines["trained"]
    assert "0 parameters" in lines["frozen"]
    assert "position" in lines["client state"]
    assert {"weights", "exp_avg", "exp_avg_sq", "buffers", "random"} <= lines.keys()
    assert "rank-00001.safetensors" in output and "manifest.json" in output

    code, output, _ = run(capsys, "inspect", folder / TAG, "--tensors", "weights/*q_proj.B")
    assert [line.split() for line in output.splitlines()] == [
        [f"weights/model.layers.{i}.self_attn.q_proj.B", "24x5", "F32", "2", "pieces"] for i in range(2)
    ]
    everything = run(capsys, "inspect", folder / TAG, "--tensors")[1]
    assert "random/0.1" in everything
    assert "exp_avg/model.norm.weight" in everything
    assert "no tensor" in run(capsys, "inspect", folder / TAG, "--tensors", "nothing")[1]


def test_inspect_counts_what_layers_keep(made, capsys):
    folder, _, _ = made("projected")

    lines = {line.split("  ")[0]: line for line in run(capsys, "inspect", folder / TAG)[1].splitlines()}

    assert "bfloat16" in lines["layout"]
    assert "22" in lines["frozen"].split()  # 14 matrices, 4 bases of a layer
    assert lines["frozen"].endswith("weights that are not trained")
    # A basis that layers share is there once.
    keys = run(capsys, "inspect", folder / TAG, "--tensors", "frozen/*.0.self_attn.*basis")[1].splitlines()
    assert [key.split()[0].split(".")[-2] for key in keys] == ["o_proj", "q_proj"]


def test_what_is_no_checkpoint_of_ours(ranks, tmp_path, capsys):
    ranks(2).run(f"{MODULE}:make_deepspeed", str(tmp_path / "theirs"))
    for place in (tmp_path / "theirs", next((tmp_path / "theirs").glob("global_step*")), tmp_path):
        code, _, errors = run(capsys, "inspect", place)
        assert code == 2
        assert "zero_to_fp32.py" in errors and "engine.load_checkpoint" in errors
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in run(capsys, "verify", tmp_path / "empty")[2]
    code, _, errors = run(capsys, "verify", tmp_path / "nowhere")
    assert (code, errors) == (2, f"error: there is no {tmp_path / 'nowhere'}\n")


def test_folders_that_are_not_to_be_written(odd, tmp_path, capsys):
    folder, to = odd[0], ("--to", "safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in run(capsys, "export", folder, *to, tmp_path)[2]
    assert "something else" in run(capsys, "export", folder, *to, tmp_path, "--overwrite")[2]
    assert "is a file" in run(capsys, "export", folder, *to, tmp_path / "notes.txt")[2]
    assert "in, a checkpoint" in run(capsys, "export", folder, *to, folder / "first", "--overwrite")[2]
    assert "in, a checkpoint" in run(capsys, "export", folder, *to, folder / "second" / "out")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]

    out = tmp_path / "out"
    assert run(capsys, "export", folder, *to, out)[0] == 0
    (out / "README.md").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    assert run(capsys, "export", folder, *to, out)[0] == 2
    (out / "base").mkdir()
    (out / "base/config.json").write_text("mine")
    assert run(capsys, "export", folder, *to, out, "--overwrite")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "base", "model.safetensors"]
    assert (out / "base/config.json").read_text() == "mine"


def test_what_a_form_cannot_hold(made, odd, tmp_path, capsys):
    errors = run(capsys, "export", made("low-rank")[0], "--to", "peft", tmp_path / "out")[2]
    assert '"low_rank"' in errors and "`--to hf`" in errors
    errors = run(capsys, "export", odd[0], "--to", "hf", "--dense", tmp_path / "out")[2]
    assert "--dense is for" in errors
    errors = run(capsys, "export", odd[0], tmp_path / "out")[2]
    assert "--to" in errors and "--help" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_layers_without_a_dense_weight(made, tmp_path, capsys):
    errors = run(capsys, "export", made("CoLA")[0], "--to", "hf", tmp_path / "out")[2]
    assert "no dense weight" in errors and "--to safetensors" in errors
    assert run(capsys, "export", made("CoLA")[0], "--to", "safetensors", tmp_path / "out")[0] == 0


def test_a_tokenizer_goes_with_the_model(made, tmp_path, capsys):
    tokenizer, directory = Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")), made("low-rank")[0]
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    argv = ("export", directory, "--to", "hf", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json")
    code, _, errors = run(capsys, *argv[:-1], EMBEDDED_TOKENIZER)
    assert code == 2
    assert "has 4,096 entries and the model" in errors
    assert run(capsys, *argv)[0] == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 2
    assert "tokenizer" in run(capsys, *argv[:-1], tmp_path / "none.json", "--overwrite")[2]
    assert (tmp_path / "out/model.safetensors").is_file()


def test_as_a_program(made, tmp_path):
    """Neither DeepSpeed nor the planning of distributed checkpoints is imported; transformers' models do so."""
    folder = str(made("low-rank")[0])
    program = (
        "import sys\n"
        "from megalr.checkpoint.__main__ import main\n"
        f"code = main(['inspect', {folder!r}]) + main(['verify', {folder!r}])\n"
        f"code += main(['export', {folder!r}, '--to', 'safetensors', {str(tmp_path / 'out')!r}])\n"
        "sys.exit(code or sorted({'deepspeed', 'torch.distributed.checkpoint'} & set(sys.modules)) or 0)"
    )

    done = processes.run(processes.python(program), check=False)

    assert (done.code, done.stderr) == (0, "")
    listed, verified, exported = done.stdout.splitlines()
    assert listed.startswith(f"{TAG}  latest")
    assert "is whole" in verified
    assert exported == f"{tmp_path / 'out'}: safetensors, float32, of {folder}/{TAG} ({UPDATES} updates)"


def flip(path: Path, place: int) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
