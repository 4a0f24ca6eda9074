"""Monitors whose package is missing are said before anything is read; what is there passes."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalr.errors import UserError
from megalr.hosts.deepspeed import DeepSpeedEngine
from megalr.train.monitors import PACKAGES, check_monitors, continue_files, monitor_numbers

MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages that are there; nothing else is."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in MODULES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)

    def install(module, version=None):
        (tmp_path / module).mkdir()
        if version is not None:
            (tmp_path / module / "__init__.py").touch()
            info = tmp_path / f"{module}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")

    return install


@pytest.mark.parametrize("section", MODULES)
def test_a_missing_package_is_named(installed, section):
    check_monitors({section: {"enabled": False}, "csv_monitor": {"enabled": True}})
    with pytest.raises(
        UserError, match=rf'enables "{section}".* is not installed: run `pip install .?{MODULES[section]}'
    ):
        check_monitors({section: {"enabled": True}})


@pytest.mark.parametrize("section", MODULES)
def test_a_package_that_is_there_passes(installed, section):
    installed(MODULES[section], "99.1")
    check_monitors({section: {"enabled": True}})


def test_a_folder_that_a_monitor_has_written_is_no_package(installed):
    installed("wandb")
    with pytest.raises(UserError, match="wandb, and that is not installed"):
        check_monitors({"wandb": {"enabled": True}})


def test_comet_has_to_be_new_enough(installed):
    installed("comet_ml", "3.40.9")
    with pytest.raises(UserError, match=r"installed as 3\.40\.9: run `pip install 'comet_ml>=3\.41\.0'`"):
        check_monitors({"comet": {"enabled": True}})


def test_all_monitors_get_the_same_names_and_numbers(tmp_path, monkeypatch):
    """DeepSpeed's own monitors; of the services, whose packages are stand-ins, what their calls are given."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    logged = {"wandb": {}, "comet": {}}

    def log(data, step, commit):
        logged["wandb"] |= {name: (step, value) for name, value in data.items()}

    def log_metric(name, value, step):
        logged["comet"][name] = (step, value)

    experiment = SimpleNamespace(__internal_api__log_metric__=log_metric)
    wandb = SimpleNamespace(init=lambda **_: None, log=log)
    comet = SimpleNamespace(__version__="3.50.0", start=lambda **_: experiment)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "files"}
    json = {"tensorboard": section, "csv_monitor": section, "wandb": {"enabled": True}, "comet": {"enabled": True}}
    engine = SimpleNamespace(monitor=MonitorMaster(get_monitor_config(json)), global_samples=24)
    row = {"loss": 2.0, "grad_norm": 0.5, "mfu": None, "seconds": {"total": 3.0}, "learning_rates": {"norm": 0.25}}

    DeepSpeedEngine(engine).report(monitor_numbers(row))

    expected = {
        "Train/Samples/train_loss": (24, 2.0),
        "Train/Samples/grad_norm": (24, 0.5),
        "Train/Samples/seconds_total": (24, 3.0),
        "Train/Samples/lr_norm": (24, 0.25),
    }
    assert logged == {"wandb": expected, "comet": expected}
    events = EventAccumulator(str(tmp_path / "files")).Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert {name: (found.step, found.value) for name, (found,) in scalars.items()} == expected
    for name, (step, value) in expected.items():
        assert (tmp_path / "files" / f"{name.replace('/', '_')}.csv").read_text().splitlines()[1] == f"{step},{value}"


def test_deepspeed_has_no_other_monitors_with_packages():
    from deepspeed.monitor.config import DeepSpeedMonitorConfig

    assert set(DeepSpeedMonitorConfig.model_fields) == {*PACKAGES, "csv_monitor"} == {*MODULES, "csv_monitor"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("step,loss\r\n8,1.0\r\n16,2.0\r\n24,3.0\r\n32,4.0\r\n", "step,loss\r\n8,1.0\r\n16,2.0\r\n24,3.0\r\n"),
        # Of an older version, which went on after 8: a second header, and rows that were made again.
        ("step,loss\r\n8,1.0\r\n16,9.0\r\nstep,loss\r\n16,2.0\r\n", "step,loss\r\n8,1.0\r\n16,2.0\r\n"),
        # A full disk has left half a row, and a kill another.
        ("step,loss\r\n8,1.0\r\n16,1.16,1.5\r\n16,2.0\r\n24", "step,loss\r\n8,1.0\r\n16,2.0\r\n"),
        ("step,loss\r\n", "step,loss\r\n"),
        ("step,other\n99,1\n", "step,other\n99,1\n"),  # of somebody else
        ("", ""),
    ],
)  # fmt: skip
def test_files_of_monitors_go_on_where_the_run_does(tmp_path, text, left):
    inside, outside = tmp_path / "run/csv_monitor/Train_loss.csv", tmp_path / "logs/Train_loss.csv"
    for file in (inside, outside):
        file.parent.mkdir(parents=True)
        file.write_bytes(text.encode())
        headed = continue_files(file.parent, 24, tmp_path / "run")
        assert headed == (["Train_loss"] if "step,loss" in text else [])
    assert inside.read_bytes().decode() == left
    assert outside.read_bytes().decode() == text
