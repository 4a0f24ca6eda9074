"""Methods that users add: how modules are found, and what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from megalr.layers.base import FactorizedLinear, Parametrization
from megalr.layers.low_rank import LowRankConfig
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.relora import ReloraConfig
from megalr.optim.events.relora import Merges
from megalr.plugins import absolute_plugin
from megalr.rules.base import Rule
from megalr.rules.muon import Muon
from megalr.rules.registry import RULES
from tests.processes import python, run
from tests.registries import forgotten

ROOT = Path(__file__).parents[2]
RULE = """
from dataclasses import dataclass
import megalr
from megalr.rules.muon import Muon

@megalr.register_rule("{name}")
@dataclass(frozen=True, kw_only=True)
class Mine(Muon):
    sharpness: float = 1.0
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnRelora(ReloraConfig):
    """ReLoRA under another name."""


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is forgotten after it."""
    with forgotten():
        megalr.register_parametrization("own_relora")(OwnRelora)
        yield


def config(*plugins, kind="Mine", **params):
    return MegalrConfig.from_json({"optimizer": {"type": kind, "params": params}, "megalr": {"plugins": [*plugins]}})


def write(folder, name="Mine", text=RULE):
    folder.mkdir(exist_ok=True)
    path = folder / "own rules.py"
    path.write_text(text.format(name=name))
    return path


def test_a_file_registers_a_rule_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a folder")
    rule = config(str(path), sharpness=2).optimizer.rule
    assert (type(rule).__name__, rule.sharpness) == ("Mine", 2.0)
    monkeypatch.chdir(path.parent)
    assert type(config(path.name, str(path), kind="mine").optimizer.rule) is type(rule)
    with pytest.raises(megalr.UserError, match='has no key "sharpnes"; did you mean "sharpness"'):
        config(str(path), sharpnes=2)


def test_a_module_registers_a_rule(tmp_path, monkeypatch):
    write(tmp_path, "Module").rename(tmp_path / "own_rules_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert config("own_rules_module", kind="Module").optimizer.rule.sharpness == 1.0


def test_an_installed_package_registers_a_rule(tmp_path):
    write(tmp_path, "Installed").rename(tmp_path / "own_rules_package.py")
    info = tmp_path / "own_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megalr.plugins]\nrules = own_rules_package\n")
    program = "import megalr, sys, json; print(megalr.MegalrConfig.from_json(json.loads(sys.argv[1])).optimizer.rule)"
    content = json.dumps({"optimizer": {"type": "Installed", "params": {"sharpness": 3}}})
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert "sharpness=3.0" in run(python(program, content), env={"PYTHONPATH": path}).stdout


def test_what_cannot_be_imported(tmp_path):
    with pytest.raises(megalr.UserError, match="there is no such file"):
        config(str(tmp_path / "none.py"))
    with pytest.raises(megalr.UserError, match="no_such_module cannot be imported: ModuleNotFoundError"):
        config("no_such_module")
    broken = write(tmp_path, text="import megalr\nraise RuntimeError('so it is')")
    for _ in range(2):
        with pytest.raises(megalr.UserError, match="own rules.py cannot be imported: RuntimeError: so it is"):
            config(str(broken))
    with pytest.raises(megalr.UserError, match=r'megalr.plugins is "a.py"; expected a list of strings'):
        MegalrConfig.from_json({"megalr": {"plugins": "a.py"}})


def test_names_that_are_taken_and_things_that_are_no_methods(tmp_path):
    with pytest.raises(megalr.UserError, match='there is a rule called "galore_adamw" already'):
        config(str(write(tmp_path, "galore_adamw")))
    with pytest.raises(megalr.UserError, match="derives from megalr.rules.base.Rule, not <class 'dict'>"):
        megalr.register_rule("x")(dict)
    with pytest.raises(megalr.UserError, match='there is a parametrization called "low_rank" already'):
        megalr.register_parametrization("low_rank")(PARAMETRIZATIONS["projected"])
    with pytest.raises(megalr.UserError, match="derives from megalr.layers.base.Parametrization, not"):
        megalr.register_parametrization("x")(Muon)


@pytest.mark.parametrize("parent", ["low_rank", "sltrain", "projected", "cola"])
def test_a_parametrization_of_ones_own(parent):
    @megalr.register_parametrization("own_layers")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(PARAMETRIZATIONS[parent]):
        """The parent's layers under another name."""

    section = {"megalr": {"parametrization": {"type": "own_layers", "rank": 3}}}
    chosen = MegalrConfig.from_json(section).parametrization
    assert isinstance(chosen, Own) and chosen.type == "own_layers"


def test_methods_that_are_not_whole():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sketch(Rule):
        def init_state(self, shape, device="cpu"):
            return {}

        def update(self, grad, state, basis):
            return grad

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Layers(Parametrization):
        def replace(self, layer, *, seed, name):
            return layer

    with pytest.raises(megalr.UserError, match=r"Sketch lacks flops\(\), state_numel\(\), name; see megalr.rules.base"):
        megalr.register_rule("Sketch")(Sketch)
    with pytest.raises(megalr.UserError, match=r"Layers lacks weight\(\), parts; see megalr.layers.base.Parametriz"):
        megalr.register_parametrization("layers")(Layers)
    assert "Sketch" not in RULES and "layers" not in PARAMETRIZATIONS


OWN = {"parametrization": {"type": "own_layers", "rank": 2, "target_modules": ["attn"]}}


def made(layer):
    """A model of which a parametrization of one's own replaces a linear layer by this one."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(LowRankConfig):
        def replace(self, dense, *, seed, name):
            return layer

    PARAMETRIZATIONS["own_layers"] = Own
    return megalr.parametrize(nn.ModuleDict({"attn": nn.Linear(6, 5)}), {"megalr": OWN})


class Factor(FactorizedLinear):
    """A layer with one parameter."""

    def __init__(self, *shape):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(shape))


def test_layers_that_the_optimizer_would_not_find():
    class Misnamed(Factor):
        factors = ("A", "C")

    with pytest.raises(megalr.UserError, match="Own.replace returns Linear, which has to derive from megalr.layers"):
        made(nn.Linear(6, 5))
    for layer, words in ((Factor(2, 6), "is missing"), (Misnamed(2, 6), "names C")):
        with pytest.raises(megalr.UserError, match=f"`factors` {words}: write the names of the param.*, of A$"):
            made(layer)


def test_a_vector_among_factors_is_for_some_rules_only():
    class Vector(Factor):
        factors = ("A",)

    model = made(Vector(5))
    with pytest.raises(megalr.UserError, match="attn.A is a vector: write AdamW, or .* `takes_vectors = True`"):
        megalr.build_optimizer(model, {"optimizer": {"type": "Muon"}, "megalr": OWN})
    megalr.build_optimizer(model, {"optimizer": {"type": "AdamMini"}, "megalr": OWN})


def test_the_example_of_layers():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(60, 80), "attn_out": nn.Linear(60, 80, bias=False)})
    dense_std = model["attn"].weight.std().item()
    section = {"type": "gained_low_rank", "rank": 30, "target_modules": ["attn"]}
    content = {"megalr": {"parametrization": section, "plugins": [str(ROOT / "examples" / "own_layers.py")]}}
    megalr.parametrize(model, content)
    nn.init.uniform_(model["attn"].s, 0.9, 1.1)
    dense, x = densify(model.state_dict(), MegalrConfig.from_json(content).parametrization), torch.randn(3, 60)
    for name, layer in model.items():
        weight = dense[f"{name}.weight"]
        assert weight.std().item() == pytest.approx(dense_std, rel=0.1)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    with torch.device("meta"):
        megalr.parametrize(nn.ModuleDict({"attn": nn.Linear(60, 80)}), content)
    content["megalr"]["refactorization"] = {"interval": 5}
    with pytest.raises(megalr.UserError, match='"gained_low_rank" has a gain beside them'):
        MegalrConfig.from_json(content)


def train(section, updates):
    """A layer after some updates, and its optimizer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(6, 5)})
    content = {"megalr": {"parametrization": {"rank": 3, "target_modules": ["attn"], **section}}}
    megalr.parametrize(model, content)
    optimizer = megalr.build_optimizer(model, content)
    for _ in range(updates):
        model["attn"](torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model["attn"], optimizer


RELORA = {"type": "own_relora", "merge_every": 2, "restart_warmup_steps": 1}


def test_a_parametrization_has_the_events_of_its_parent():
    layer, optimizer = train(RELORA, 1)
    start = layer.weight.detach().clone()
    assert layer.B.any()
    layer, optimizer = train(RELORA, 2)
    assert optimizer.refreshes == 1 and not layer.B.any() and not torch.equal(layer.weight, start)


def test_a_parametrization_has_events_of_its_own():
    @megalr.register_events(OwnRelora)
    class Counted(Merges):
        def end_update(self, updates):
            seen.append(updates)
            return super().end_update(updates)

    seen = []
    assert train(RELORA, 3)[1].refreshes == 1 and seen == [1, 2, 3]
    seen.clear()
    assert train({**RELORA, "type": "relora"}, 3)[1].refreshes == 1 and seen == []
    with pytest.raises(megalr.UserError, match="OwnRelora has the events Counted already: derive"):
        megalr.register_events(OwnRelora)(Merges)
    with pytest.raises(megalr.UserError, match="derive from megalr.optim.layer_events.LayerEvents, not <class 'dict'>"):
        megalr.register_events(OwnRelora)(dict)
    with pytest.raises(megalr.UserError, match="derives from Parametrization, not <class 'dict'>"):
        megalr.register_events(dict)(Merges)


def test_names_that_mean_the_same_anywhere(tmp_path, monkeypatch):
    path = write(tmp_path)
    assert absolute_plugin(path.name, tmp_path) == str(path)
    assert absolute_plugin("a.module", tmp_path) == "a.module"
    monkeypatch.chdir(tmp_path)
    assert absolute_plugin(path.name) == str(path)
    assert absolute_plugin("gone.py") == str(tmp_path / "gone.py")
