"""The shipped model shapes have the published sizes, dense and factorised."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalr.config.settings import LowRankConfig
from megalr.layers import parametrize
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.memory.formulas import paper_bytes, records
from megalr.memory.table import ALWAYS, main
from megalr.rules.registry import RULES
from tests.processes import run

MODELS = Path(__file__).parents[2] / "launchers" / "models"

# parameters of the dense model and, at the published rank, of the low-rank one
SIZES = {
    "tiny": (1_852_544, 32, 1_365_120),
    "9m": (8_995_968, 32, 8_508_544),
    "60m": (58_073_600, 128, 42_770_944),
    "130m": (134_105_856, 256, 93_997_824),
    "350m": (367_969_280, 256, 185_222_144),
    "1b": (1_339_082_752, 512, 609_310_720),
    "7b": (6_738_415_616, 1024, 2_820_935_680),
}

# published: millions of parameters, dense and low-rank; 1e9 bytes, dense, GaLore and low-rank
PUBLISHED = {
    "60m": (58.07, 42.77, 0.348, 0.280, 0.257),
    "130m": (134.1, 94.0, 0.805, 0.611, 0.564),
    "350m": (368.0, 185.2, 2.208, 1.389, 1.111),
    "1b": (1339.1, 609.3, 8.034, 4.763, 3.656),
    "7b": (6738, 2821, 40.43, 22.88, 16.93),
}


def build(size: str, rank: int | None = None) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(MODELS / f"{size}.json"))
    if rank is not None:
        parametrize(model, LowRankConfig(rank=rank))
    return model


def matches(published: float):
    """Equal up to the last published digit."""
    digits = len(str(published).partition(".")[2])
    return pytest.approx(published, abs=0.501 * 10**-digits, rel=0)


def test_every_shipped_shape_is_checked():
    assert {path.stem for path in MODELS.glob("*.json")} == set(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_shape_is_a_llama_with_untied_head_and_no_bias(size):
    config = LlamaConfig.from_json_file(MODELS / f"{size}.json")
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.hidden_size % config.num_attention_heads == 0
    model = build(size)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    dense, rank, low_rank = SIZES[size]
    assert sum(record.numel for record in records(build(size))) == dense
    factorised = records(build(size, rank))
    assert sum(record.numel for record in factorised) == low_rank
    assert {record.kind for record in factorised if ".self_attn." in record.name} == {"factor"}
    assert {record.kind for record in factorised if "embed" in record.name or "norm" in record.name} == {"dense"}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts_and_memory(size):
    def galore(record):  # one projector (m, r) and two moments (r, n), where m <= n
        if "attn" not in record.name and "mlp" not in record.name:
            return None
        m, n = sorted(record.shape)
        return m * rank + 2 * n * rank

    million_dense, million_low_rank, *gigabytes = PUBLISHED[size]
    _, rank, _ = SIZES[size]
    dense, low_rank = records(build(size)), records(build(size, rank))
    assert sum(record.numel for record in dense) / 1e6 == matches(million_dense)
    assert sum(record.numel for record in low_rank) / 1e6 == matches(million_low_rank)
    counted = paper_bytes(dense), paper_bytes(dense, treated_state=galore), paper_bytes(low_rank)
    assert [bytes_ / 1e9 for bytes_ in counted] == [matches(published) for published in gigabytes]


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("optimizer", ["GaLoreAdamW", "FiraAdamW", "APOLLO"])
def test_published_memory_of_projected_rules(optimizer, size):
    """With the rules' own count of their state; a scalar of a matrix is nothing in these digits."""
    rule = RULES[optimizer](rank=SIZES[size][1])

    def treated(record):
        return rule.state_numel(record.shape) if "attn" in record.name or "mlp" in record.name else None

    assert paper_bytes(records(build(size)), treated_state=treated) / 1e9 == matches(PUBLISHED[size][3])


def table(capsys, *flags):
    """The cells of each row that launchers/plan.py prints."""
    assert main(flags, build) == 0
    lines = capsys.readouterr().out.splitlines()[4:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_plan_has_a_row_for_each_rule(capsys):
    """130M at stage 3 over 8 ranks: 0.611 GB of GaLore, as published; state of the largest rank."""
    flags = ("--models", "130m", "--ranks", "256", "--stage", "3", "--processes", "8")
    cells = table(capsys, *flags, "--optimizers", "GaLoreAdamW", "Muon")
    assert [row[1] for row in cells] == ["dense", "low-rank 256", "projected 256", "GaLoreAdamW 256", "Muon"]
    projected, galore, muon = cells[2:]
    assert galore[3] == "611 MB"
    # Adam's 8 bytes for embedding and head; matrices of 768 x 768 and 768 x 2048 have m r + 2 n r floats, or m n.
    matrices = 12 * (4 * 768**2 + 3 * 768 * 2048)
    adam = 8 * (134_105_856 - matrices) / 8
    galore_state = 4 * 12 * (4 * 3 * 768 * 256 + 3 * (768 + 2 * 2048) * 256) / 8
    # Everything but the matrices trained densely, R (m, r) with all of Adam's 16 bytes; W0 and Q are weights alone.
    trained = 134_105_856 - matrices + 12 * (4 * 768 * 256 + (768 + 2 * 2048) * 256)
    assert megabytes(projected[7]) == pytest.approx(8 * trained / 8 / 1e6, rel=0.02)
    assert megabytes(projected[4]) == pytest.approx(
        2 * (trained + matrices + 12 * (3 * 768 + 2048) * 256) / 8 / 1e6, rel=0.02
    )
    assert megabytes(galore[7]) == pytest.approx((adam + galore_state) / 1e6, rel=0.02)
    assert megabytes(muon[7]) == pytest.approx((adam + 4 * matrices / 8) / 1e6, rel=0.03)


def test_plan_has_a_row_for_each_parametrization(capsys):
    """SLTrain's paper count at 130M is 0.589 GB with indices of 32 bits."""
    kinds = ["sltrain", "lora", "relora", "cola", "mora", "loro", "switchlora"]
    cells = table(capsys, "--models", "130m", "--ranks", "256", "--parametrizations", *kinds)[3:]
    assert [row[1] for row in cells] == [f"{kind} 256" for kind in kinds]
    assert cells[0][3] == "589 MB" and cells[1][2:] == cells[2][2:] == cells[6][2:] and cells[3][2:] == cells[5][2:]


def test_plan_counts_remainders(capsys):
    """2 bytes for each element of W0, an eighth of them on each of 8 processes."""
    optimizer = {}
    for rounding in ("nearest", "remainder"):
        flags = ("--models", "130m", "--ranks", "256", "--processes", "8", "--merge-rounding", rounding)
        cells = table(capsys, *flags, "--parametrizations", "relora", "lora")[2:]
        assert [row[1] for row in cells] == ["projected 256", "relora 256", "lora 256"]
        optimizer[rounding] = [megabytes(row[7]) for row in cells]
    remainders = 2 * 12 * (4 * 768**2 + 3 * 768 * 2048) / 8 / 1e6
    differences = [new - old for old, new in zip(*optimizer.values(), strict=True)]
    assert differences == pytest.approx([remainders, remainders, 0], abs=0.6)


def test_plan_names_what_it_takes(tmp_path):
    """The help lists no parametrization that is refused; a plugin's rules and parametrizations are as good as any."""
    plugin = tmp_path / "methods.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "import megalr\n"
        "from megalr.layers.lora import LoraConfig\n"
        "from megalr.rules.muon import Muon\n"
        "megalr.register_rule('OwnMuon')(Muon)\n"
        "@megalr.register_parametrization('own_lora')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class OwnLora(LoraConfig):\n"
        "    type: str = 'own_lora'\n"
    )

    def plan(*flags, warm=True):
        command = [sys.executable, str(MODELS.parent / "plan.py"), "--models", "9m", "--ranks", "32", *flags]
        return run(command, check=False, warm=warm)

    words = " ".join(plan("--help", warm=False).stdout.split())
    ours = [name for name, kind in PARAMETRIZATIONS.items() if kind.__module__.startswith("megalr.")]
    others = [name for name in ours if name not in ALWAYS]
    assert f"others to add to {', '.join(ALWAYS)}, at the same r: {', '.join(others)}" in words
    lines = plan("--plugins", str(plugin), "--parametrizations", "own_lora", "lora", "--optimizers", "OwnMuon", "Muon")
    own_lora, lora, own_muon, muon = (line.split(" | ") for line in lines.stdout.splitlines()[7:])
    assert (own_lora[1], own_muon[1]) == ("own_lora 32", "OwnMuon")
    assert own_lora[2:] == lora[2:] and own_muon[2:] == muon[2:]
    refused = plan("--plugins", str(tmp_path / "none.py"))
    assert refused.code == 2 and "there is no such file" in refused.stderr


def megabytes(cell):
    number, unit = cell.split()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


def test_paper_bytes_takes_a_model_or_its_records():
    model = build("tiny")
    assert paper_bytes(model) == paper_bytes(records(model)) == 6 * SIZES["tiny"][0]
