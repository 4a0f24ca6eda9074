"""An ordinary torch job as a host: parameters that no engine has marked are whole, and written in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalr import hosts
from megalr.errors import UserError
from megalr.hosts.base import Host
from megalr.hosts.choice import host_of_groups, host_of_parameter
from megalr.hosts.deepspeed import DeepSpeed
from megalr.hosts.plain import Plain
from tests.processes import python, run


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.arange(6.0).view(2, 3))


def test_a_parameter_without_marks_is_whole(parameter):
    assert isinstance(host_of_parameter(parameter), Plain)
    ((start, flat),) = hosts.held(parameter)
    assert start == 0 and torch.equal(flat, torch.arange(6.0))
    assert flat.data_ptr() == parameter.data_ptr()
    assert hosts.logical_shape(parameter) == (2, 3)
    assert not hosts.is_partitioned(parameter)
    assert hosts.is_replicated(parameter)


def test_a_write_goes_to_the_parameter_itself(parameter):
    hosts.write(parameter, torch.full((2, 3), 7, dtype=torch.float64))
    assert torch.equal(parameter.data, torch.full((2, 3), 7.0)) and parameter.dtype == torch.float32
    with hosts.gather([parameter]):
        assert parameter.numel() == 6


def test_every_copy_is_written_where_it_begins(parameter):
    class Parts(Host):
        """Holds the last four elements, and a copy of the first two."""

        beside = torch.zeros(2)

        def read(self, named_groups, param_groups):
            raise NotImplementedError

        def held(self, parameter):
            return [(2, parameter.data.view(-1)[2:])]

        def copies(self, parameter):
            return [*self.held(parameter), (0, self.beside)]

    host = Parts()
    host.write(parameter, torch.tensor([[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]))
    assert parameter.data.view(-1).tolist() == [0.0, 1.0, 12.0, 13.0, 14.0, 15.0]
    assert host.beside.tolist() == [10.0, 11.0]


def test_one_process_holds_all_it_trains_and_nothing_that_is_frozen():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    named = dict(model.named_parameters())
    groups = [{"params": list(named.values())}]
    assert isinstance(host_of_groups([named], groups), Plain)
    local, whole = hosts.read([named], groups)
    assert local is whole and whole.replicated and not whole.dry_run and whole.group is None
    assert whole.layout.shapes == {"0.weight": (3, 2), "0.bias": (3,), "1.bias": (2,)}
    assert all(tensor is named[name] for name, tensor in zip(whole.layout.shapes, whole.parameters, strict=True))
    assert [whole.layout.is_whole_on(name, 0) for name in whole.layout.shapes] == [True] * 3
    whole.buffers[0].fill_(4.0)
    assert bool((model[0].weight == 4.0).all())
    # Nobody has looked at gradients: those that step() has not seen are none, and are looked at all the same.
    assert whole.unseen_gradients is not None and whole.unseen_gradients() == []


@pytest.mark.parametrize(
    "mark",
    [
        {"ds_id": 0, "ds_shape": torch.Size((2, 3)), "ds_numel": 6},
        {"_hp_mapping": None},
        {"tensor_model_parallel": True},
        {"ds_autotp_universal_checkpoint_meta": {}},
        {"allreduce": False},
    ],
    ids=lambda mark: next(iter(mark)),
)
def test_any_mark_of_deepspeed_makes_it_deepspeeds(parameter, mark):
    for name, value in mark.items():
        setattr(parameter, name, value)
    assert isinstance(host_of_parameter(parameter), DeepSpeed)
    assert hosts.is_partitioned(parameter) == ("ds_id" in mark)
    assert hosts.is_replicated(parameter) == ("allreduce" not in mark)
    assert hosts.logical_shape(parameter) == (2, 3)


def test_masters_beside_the_parameters_are_deepspeeds(parameter):
    assert isinstance(host_of_groups([{"w": parameter}], [{"params": [torch.zeros(2, 3)]}]), DeepSpeed)


def test_a_master_of_another_shape_is_refused(parameter):
    master = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"expected the master of w \(2, 3\), found \(3, 2\)"):
        hosts.read([{"w": parameter}], [{"params": [master]}])


def test_what_is_no_engine_is_refused():
    with pytest.raises(UserError, match="expected an engine, found a Linear: give what megalr.initialize"):
        hosts.host_of(nn.Linear(2, 2))


def test_no_engine_is_imported_to_ask():
    code = (
        "import sys, torch, megalr.hosts as hosts; p = torch.nn.Parameter(torch.zeros(2)); "
        "hosts.held(p); hosts.read([{'p': p}], [{'params': [p]}]); hosts.write(p, torch.ones(2)); "
        "print('deepspeed' in sys.modules)"
    )
    assert run(python(code)).stdout == "False\n"
