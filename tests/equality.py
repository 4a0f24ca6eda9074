"""What is trained twice, by megalr and by one plain process: the cases, their data, JSONs and runs, for any engine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from megalr.layout.planned import planned_layout
from megalr.optim.state import entries_of, numbers_of
from tests.odd_model import odd_model
from tests.plain_training import plain_training
from tests.references import REFERENCES

STAGES, WORLDS, ACCUMULATIONS = (0, 1, 2, 3), (1, 2, 3, 4), (1, 4)
UPDATES = 12
SEQUENCES, LENGTH, VOCABULARY = 48, 16, 61  # an update's 48 can be shared by 1 to 4 ranks x 1 or 4 micro-batches
CLIPPING = 0.5  # below the gradient norm of nearly every update
BOUND = 1e-4  # of the relative error of any tensor, in the 2-norm


@dataclass(frozen=True, eq=False)
class Case:
    """One thing to train.

    Attributes:
        optimizer, megalr: the JSON's sections.
        plain: the weights that one plain process gives for a model and data, dense where the parametrization has
            dense weights; None where there is no second implementation, and one process of ours has to serve.
        model: makes the dense model, the same each time.
        updates: how many.
        bound: of the relative error.
        clip: the JSON's "gradient_clipping".
    """

    optimizer: Mapping[str, Any]
    megalr: Mapping[str, Any] = field(default_factory=dict)
    plain: Callable[[nn.Module, Sequence[Tensor], float], dict[str, Tensor]] | None = None
    model: Callable[[], nn.Module] = odd_model
    updates: int = UPDATES
    bound: float = BOUND
    clip: float = CLIPPING

    @functools.cached_property
    def expected(self) -> dict[str, Tensor]:
        """What the plain process gives."""
        assert self.plain is not None
        return self.plain(self.model(), batches(self.updates), self.clip)

    def weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with dense weights, where the parametrization has such."""
        parametrization = MegalrConfig.from_json({"megalr": dict(self.megalr)}).parametrization
        return dict(state) if parametrization.not_dense else densify(state, parametrization)


def rule_case(
    type_name: str, *, variant: Sequence[str] = (), megalr: Mapping[str, Any] | None = None, **params: Any
) -> Case:
    """A rule on the matrices of the odd model.

    Args:
        type_name: of the rule.
        variant: of the model, see :func:`~tests.odd_model.odd_model`.
        megalr: the JSON's section.
        **params: "optimizer.params" that differ from the reference's ``trained_with``.
    """
    given = {**REFERENCES[type_name].trained_with, **params}

    def plain(model: nn.Module, data: Sequence[Tensor], clip: float) -> dict[str, Tensor]:
        return plain_training(model, data, type_name, given, clip=clip)

    model = functools.partial(odd_model, **dict.fromkeys(variant, True))
    return Case({"type": type_name, "params": given}, {"exchange_bucket_bytes": 20_000, **(megalr or {})}, plain, model)


def calls_of(case: Case) -> int:
    """Matrices that a case's rule updates, each counted once for each update."""
    rule = MegalrConfig.from_json({"optimizer": dict(case.optimizer)}).optimizer.rule
    if rule is None:
        return 0
    params, model = case.optimizer["params"], case.model()
    ends = [("lm_head", params.get("head")), ("embed_tokens", params.get("embeddings"))]
    patterns = [*params["target_modules"], *(name for name, chosen in ends if chosen)]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim > 1 and any(t in n for t in patterns)}
    names = list(planned_layout([shapes], stage=0, world_size=1).matrices(shapes).shapes)
    return sum(len(names) - len(rule.resting(names, t, 0)) for t in range(case.updates))


def without_reference(case: Case) -> Case:
    """The case, to be compared with one process of ours."""
    return replace(case, plain=None)


def batches(updates: int) -> list[Tensor]:
    """Token ids of each update, (SEQUENCES, LENGTH)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator) for _ in range(updates)]


def configuration(case: Case, stage: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed JSON for the current world size; ``changes`` are merged in, section by section."""
    config: dict[str, Any] = {
        "train_batch_size": SEQUENCES,
        "train_micro_batch_size_per_gpu": SEQUENCES // accumulation // dist.get_world_size(),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": case.clip,
        "steps_per_print": 10**9,
        # Without persistence every parameter is cut at stage 3, and small buckets hold few of them.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0},
        "optimizer": copy.deepcopy(dict(case.optimizer)),
        "megalr": copy.deepcopy(dict(case.megalr)),
    }
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    return config


def run(engine: Any, data: Sequence[Tensor]) -> None:
    """One update for each global batch, of which this rank takes its rows."""
    rank, world, passes = dist.get_rank(), dist.get_world_size(), engine.gradient_accumulation_steps()
    micro = SEQUENCES // passes // world
    for ids in data:
        for a in range(passes):
            begin = (a * world + rank) * micro
            rows = ids[begin : begin + micro]
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()


def everything(engine: Any) -> dict[str, Any]:
    """Copies of all that training depends on, of this rank."""
    optimizer, module = engine.basic_optimizer, engine.module
    seen: dict[str, Any] = {"numbers": numbers_of(optimizer)}
    seen |= {f"weight {name}": held.detach().clone() for name, held in module.named_parameters()}
    seen |= {f"buffer {name}": held.detach().clone() for name, held in module.named_buffers()}
    for key, entry in entries_of(optimizer, once=False).items():
        seen |= {f"{key} {piece.offsets}": piece.data.clone() for piece in entry.pieces}
    return seen


def different(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same bit for bit."""
    alike = [key for key in first.keys() & second.keys() if same(first[key], second[key])]
    return sorted((first.keys() | second.keys()) - set(alike))


def same(first: Any, second: Any) -> bool:
    """Bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return bool(first == second)


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every tensor: relative, in the 2-norm."""
    assert got.keys() == expected.keys()
    return {name: ((got[name] - w).norm() / w.norm()).item() for name, w in expected.items()}


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = BOUND) -> None:
    """No tensor is further off than the bound."""
    found = errors(got, expected)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < bound, f"{worst}: {found[worst]:.1e}"
