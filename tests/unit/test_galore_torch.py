"""GaLore against the package galore-torch 1.0: the same weights where both do the same, and where they do not."""

import importlib
import importlib.util
import io
import math
import pickle
import sys
import types

import pytest
import torch

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from megalr.rules.galore import GaLore
from tests.deepspeed import training
from tests.unit.rule_runs import drifting_gradients

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("galore_torch") is None,
        reason="galore-torch is not installed: pip install --no-deps -r requirements-compare.txt",
    ),
    pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated"),
]

LR, GAP, SCALE = 0.01, 7, 0.25


@pytest.fixture(autouse=True, scope="module")
def without_bitsandbytes():
    """The package imports bitsandbytes for its 8-bit optimizer alone; a stub of it serves where it is missing."""
    missing = {}
    if importlib.util.find_spec("bitsandbytes") is None:
        missing = {
            name: types.ModuleType(name)
            for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
        }
        missing["bitsandbytes.optim.optimizer"].Optimizer2State = object
    sys.modules.update(missing)
    importlib.import_module("galore_torch")
    yield
    for name in missing:
        del sys.modules[name]


def package_optimizer(weight, *, rank, proj_type="std", eps=1e-30, weight_decay=0.0, betas=(0.9, 0.999)):
    group = {"params": [weight], "rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": proj_type}
    adamw = importlib.import_module("galore_torch").GaLoreAdamW
    return adamw([group], lr=LR, eps=eps, weight_decay=weight_decay, betas=betas)


def package_weight(gradients, *, start=None, **options):
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    optimizer = package_optimizer(weight, **options)
    for grad in gradients:
        weight.grad = None if grad is None else grad.clone()
        optimizer.step()
    return weight.detach()


def megalr_weight(gradients, *, rank, proj_type="std", eps=1e-30, weight_decay=0.0, start=None):
    rule = GaLore(rank=rank, update_proj_gap=GAP, scale=SCALE, proj_type=proj_type, stagger=False, eps=eps)
    shape = tuple(gradients[0].shape)
    weight, state = torch.zeros(shape) if start is None else start.clone(), rule.init_state(shape)
    for updates, grad in enumerate(gradients):
        due = rule.refresh_due(state, updates, 0)
        basis = rule.new_basis(grad, state, updates=updates, seed=0, name="w") if due else None
        weight -= LR * (rule.update(grad, state, basis) + weight_decay * weight)
    return weight


@pytest.fixture
def fixed_signs(monkeypatch):
    """The package with megalr's signs of singular vectors, which it leaves to the accidents of the arithmetic."""
    projector = importlib.import_module("galore_torch.galore_projector").GaLoreProjector
    original = projector.get_orthogonal_matrix

    def signed(self, weights, rank, type):
        found, last = original(self, weights, rank, type), self.ortho_matrix
        if type == "full":
            lasts = last or [None, None]
            return [_signed(found[0], lasts[0]), _signed(found[1].T, None if last is None else lasts[1].T).T]
        if type == "right":
            return _signed(found.T, None if last is None else last.T).T
        return _signed(found, last)

    monkeypatch.setattr(projector, "get_orthogonal_matrix", signed)


def _signed(columns, last):
    largest = columns[columns.abs().argmax(0), torch.arange(columns.shape[1])]
    agreement = largest if last is None else (columns * last).sum(0)
    return torch.where(agreement < 0, -columns, columns)


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (12, 13), (13, 12), (9, 1)])
def test_same_weights(shape, proj_type, fixed_signs):
    """30 updates with five bases agree to rounding: ε is tiny, so that its place does not matter, and nothing decays.

    Kept moments depend on the signs of the singular vectors, so both must choose them alike.
    """
    gradients = drifting_gradients(shape, 30)
    for rank in {min(rank, *shape) for rank in (1, 4, 11)}:
        expected = package_weight(gradients, rank=rank, proj_type=proj_type)
        assert relative(megalr_weight(gradients, rank=rank, proj_type=proj_type), expected) < 1e-5


@pytest.mark.parametrize(
    ("shape", "proj_type"),
    [((12, 20), "std"), ((20, 12), "std"), ((20, 12), "reverse_std"), ((16, 16), "reverse_std"), ((12, 20), "right")],
)
def test_same_weights_with_a_rank_beyond_the_matrix(shape, proj_type, fixed_signs):
    """Both take as much rank as the matrix has."""
    gradients = drifting_gradients(shape, 30)
    expected = package_weight(gradients, rank=30, proj_type=proj_type)
    assert relative(megalr_weight(gradients, rank=30, proj_type=proj_type), expected) < 1e-5


@pytest.mark.parametrize("compute", ["low_rank", "materialized"])
def test_projected_layers_train_the_same_model(compute, fixed_signs):
    """Twelve updates with three bases: the package, megalr's rule and projected layers end with the same weights."""
    params = {"lr": LR * SCALE, "eps": 1e-30, "embedding": {"lr": 1e-3}, "norm": {"lr": 1e-3}}
    settings = {"rank": 5, "update_proj_gap": 5, "stagger": False, "target_modules": ["attn", "mlp"]}
    rule = {"optimizer": {"type": "GaLoreAdamW", "params": {**params, **settings, "scale": 1.0}}}
    section = {"type": "projected", "side": "std", "moments": "keep", "compute": compute, **settings}
    layers = {"optimizer": {"type": "AdamW", "params": params}, "megalr": {"parametrization": section}}
    found = []
    for config in (rule, layers):
        model = megalr.parametrize(training.dense_model(), config)
        _train(model, megalr.build_optimizer(model, config))
        parametrization = MegalrConfig.from_json(config).parametrization
        found.append(densify({n: w.detach() for n, w in model.named_parameters()}, parametrization))
    model = training.dense_model()
    chosen = [w for n, w in model.named_parameters() if w.ndim == 2 and ("attn" in n or "mlp" in n)]
    rest = [w for w in model.parameters() if all(w is not matrix for matrix in chosen)]
    projection = {"rank": 5, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
    groups = [{"params": rest, "lr": 1e-3}, {"params": chosen, "lr": LR * SCALE, **projection}]
    _train(model, importlib.import_module("galore_torch").GaLoreAdamW(groups, eps=1e-30))
    expected = {n: w.detach() for n, w in model.named_parameters()}
    start = training.dense_model().state_dict()
    for weights in found:
        assert weights.keys() == expected.keys()
        assert max(relative(weights[n], w) for n, w in expected.items()) < 1e-4
    assert min(relative(w, start[n]) for n, w in expected.items()) > 1e-3


def _train(model, optimizer):
    for ids in training.batches(12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(12, 20), (12, 13), (1, 9)])
def test_reverse_std_fails_in_the_package_where_the_rank_is_the_shorter_side(shape, fixed_signs):
    """It takes the side to project back on from the shape of R, (m, r), and mistakes one with r = m for a left one.

    So reverse_std of a wide matrix raises once the rank is at least m; std and tall matrices are never mistaken.
    """
    gradients = drifting_gradients(shape, 8)
    rank = shape[0]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        package_weight(gradients, rank=rank, proj_type="reverse_std")
    expected = package_weight(gradients, rank=rank, proj_type="right")  # the side that was meant
    assert relative(megalr_weight(gradients, rank=rank, proj_type="reverse_std"), expected) < 1e-5
    if rank > 1:
        package_weight(gradients, rank=rank - 1, proj_type="reverse_std")


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_packages_weights_depend_on_signs_that_mean_nothing(shape, monkeypatch):
    """-u and -v are singular vectors as good as u and v. The package's weights change with them once moments are kept
    through a refresh, so it gives other results on other machines; megalr's do not.
    """
    gradients = drifting_gradients(shape, 30)
    packages, ours = [package_weight(gradients, rank=4)], [megalr_weight(gradients, rank=4)]
    decompose, calls = torch.linalg.svd, iter(range(1000))

    def flipped(matrix, **options):
        u, s, vh = decompose(matrix, **options)
        sign = -1 if next(calls) % 2 else 1  # of every other decomposition
        return sign * u, s, sign * vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    packages.append(package_weight(gradients, rank=4))
    ours.append(megalr_weight(gradients, rank=4))
    assert relative(*packages) > 0.1
    assert relative(*ours) < 1e-6


def test_epsilon_is_larger_in_the_package_at_first():
    """It adds ε to √v before the bias correction, which makes it ε / √(1 - β2ᵗ): 32 times as much in the first update.

    Against gradients of ε's size that is a first update of a fraction of Adam's.
    """
    eps = 1e-4
    first = [grad * eps for grad in drifting_gradients((12, 20), 1)]
    package, megalr = package_weight(first, rank=4, eps=eps), megalr_weight(first, rank=4, eps=eps)
    assert package.norm() < 0.1 * megalr.norm()
    assert relative(megalr_weight(first, rank=4, eps=eps / math.sqrt(1 - 0.999)), package) < 1e-5


def test_weight_decay_acts_on_the_updated_weight_in_the_package():
    """It decays W after the update was added, so the update shrinks by lr λ, too; AdamW decays W as it was before."""
    (grad,) = drifting_gradients((12, 20), 1)
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    decay = 10.0  # large, to stand out of rounding
    update = megalr_weight([grad], rank=4)
    package = package_weight([grad], rank=4, weight_decay=decay, start=start)
    torch.testing.assert_close(package, (start + update) * (1 - LR * decay))
    megalr = megalr_weight([grad], rank=4, weight_decay=decay, start=start)
    torch.testing.assert_close(megalr, start * (1 - LR * decay) + update)
    assert relative(package - start, megalr - start) > 1e-3


def test_a_missing_gradient_delays_a_parameter_in_the_package():
    """A parameter whose gradient is None is passed over, its count included: its bases come an update later for good.

    megalr counts the run's updates, alike for all matrices, and a missing gradient is a zero one.
    """
    gradients = drifting_gradients((12, 20), 2 * GAP)
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = package_optimizer(weight, rank=4)
    refreshed, last = [], None
    for updates, grad in enumerate([gradients[0], None, *gradients[2:]]):
        weight.grad = grad
        optimizer.step()
        basis = optimizer.state[weight]["projector"].ortho_matrix
        if basis is not last:
            refreshed.append(updates)
        last = basis
    assert refreshed == [0, GAP + 1]
    rule = GaLore(rank=4, update_proj_gap=GAP, stagger=False)
    state = {**rule.init_state((12, 20)), "refreshes": 1}
    assert [updates for updates in range(1, 2 * GAP) if rule.refresh_due(state, updates, 0)] == [GAP]


def test_the_packages_state_needs_unsafe_loading():
    """It keeps the basis inside an object of its own, which torch.load refuses unless weights_only is False."""
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    weight.grad = drifting_gradients((12, 20), 1)[0]
    optimizer = package_optimizer(weight, rank=4)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="GaLoreProjector"):
        torch.load(file, weights_only=True)
    file.seek(0)
    assert "projector" in torch.load(file, weights_only=False)["state"][0]
