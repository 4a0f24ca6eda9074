"""What a rule is: the update of one whole matrix, from its gradient and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

#: The shape (m, n) of a matrix.
Shape = tuple[int, int]
#: A rule's state of one matrix: tensors and numbers (int, float, bool) by key.
State = dict[str, Tensor | float]
#: The tensors of a state that a refresh replaces, by key.
Basis = dict[str, Tensor]


class Rule(ABC):
    """The update of an m x n matrix W, decoupled from learning rate and weight decay: W -= lr (update + λ W).

    A rule sees whole matrices and knows nothing of ranks. A subclass is a frozen dataclass: its keyword-only fields are
    the hyper-parameters, and the keys of ``"params"`` in the JSON. One instance serves every matrix; the
    :data:`State` of each matrix is passed in. Tensors are fp32.

    :meth:`new_basis` computes a basis apart from the update. Where several ranks hold the same state, one rank
    computes the basis and sends it, because singular vectors are not reproducible across machines.

    A subclass has to define :attr:`name`, :meth:`init_state`, :meth:`update`, :meth:`state_numel` and :meth:`flops`.
    """

    #: The JSON's "type" of a rule of this package. Leave it out: yours has the name that it is registered under.
    type_name: ClassVar[str]
    #: Name of the rule in checkpoints, tables and messages.
    name: ClassVar[str]
    #: Default learning rate, if the JSON has none.
    default_lr: ClassVar[float] = 1e-3
    #: Default epsilon, if the JSON has none.
    default_eps: ClassVar[float] = 1e-8
    #: Inherited hyper-parameters that this rule does not use; the JSON may not set them.
    unused: ClassVar[frozenset[str]] = frozenset()
    #: Keys of the state that a momentum reset sets to zero: moments, and the counts of their bias correction.
    reset_keys: ClassVar[tuple[str, ...]] = ()
    #: Keys of the state that are linear in the gradients, if all of the state is. A refactorization that transports
    #: moments maps them exactly.
    linear_keys: ClassVar[tuple[str, ...]] = ()
    #: Defaults of earlier versions that differ from today's, for checkpoints that do not name the setting.
    former_defaults: ClassVar[Mapping[str, object]] = {}
    #: Why the rule cannot train the factors of a low-rank layer; empty if it can.
    not_for_factors: ClassVar[str] = ""
    #: Why a stage of a pipeline, which knows its own matrices alone, cannot run the rule; empty where it can.
    not_in_stages: ClassVar[str] = ""
    #: Whether the rule also trains a vector among the factors, as a matrix with one row.
    takes_vectors: ClassVar[bool] = False

    def for_head(self) -> Rule:
        """Return the rule for the output head, used with ``"head": true``."""
        return self

    def for_embedding(self) -> Rule:
        """Return the rule for embeddings, used with ``"embeddings": true``."""
        return self

    def scheduled(self, factor: float) -> Rule:
        """Return the rule for one update, if more than its step length depends on the schedule of the learning rate.

        Args:
            factor: learning rate of this update divided by the one in the JSON.
        """
        return self

    @abstractmethod
    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        """Return the state of an m x n matrix before its first update.

        It has every key that there will be, since checkpoints are loaded into it: tensors with the shapes and dtypes
        that they keep, and numbers, which may be int, float (not NaN) or bool. Keys are names without a slash. The
        device may be "meta", to learn shapes.
        """

    def room(self, numbers: Mapping[str, float], shape: Shape, device: torch.device | str) -> State:
        """Return a state to read saved tensors into. Override it if earlier versions had tensors of other shapes.

        Args:
            numbers: the numbers of the saved state, by key.
            shape: (m, n).
            device: device of the tensors.
        """
        return self.init_state(shape, device) | dict(numbers)

    @abstractmethod
    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        """Compute one update.

        Args:
            grad: (m, n), fp32, finite; left as it is.
            state: of this matrix; modified in place.
            basis: the result of :meth:`new_basis` if :meth:`refresh_due` is true; else None.

        Returns:
            (m, n), fp32: what the learning rate multiplies.
        """

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        """Apply W -= lr · :meth:`update` in place. Override it if that is possible without forming the update.

        Args:
            weight: W, (m, n), fp32.
            grad, state, basis: as for :meth:`update`.
            lr: learning rate.
        """
        weight.add_(self.update(grad, state, basis), alpha=-lr)

    def reset(self, state: State) -> None:
        """Reset the momentum in place: set the entries of :attr:`reset_keys` to zero and leave the others."""
        for key in self.reset_keys:
            value = state[key]
            state[key] = value.zero_() if isinstance(value, Tensor) else type(value)(0)

    @abstractmethod
    def state_numel(self, shape: Shape) -> int:
        """Return the number of elements in the state of an m x n matrix."""

    def state_bytes(self, shape: Shape) -> int:
        """Return the bytes of the same state."""
        return 4 * self.state_numel(shape)

    @abstractmethod
    def flops(self, shape: Shape) -> float:
        """Return the leading operations of an average update, by which matrices are spread over ranks."""

    def form(self) -> dict[str, str | int | bool]:
        """Return the name of the rule and the settings that decide the shapes of its state."""
        return {"rule": self.name}

    def logical_form(self) -> dict[str, str | int | bool]:
        """Return the same without storage formats. Rules with equal results can load each other's states."""
        return self.form()

    def convert(self, state: State, shape: Shape) -> State:
        """Convert the state of an m x n matrix to the format of this rule; the result may share tensors with it.

        Args:
            state: from a rule with the same :meth:`logical_form`.
            shape: (m, n).
        """
        return state

    def rank_of(self, shape: Shape) -> int | None:
        """Return the rank that an m x n matrix is projected to; None for a rule without projection."""
        return None

    def resting(self, names: Sequence[str], updates: int, seed: int) -> frozenset[str]:
        """Return the matrices that the next update leaves alone; they have no state then.

        Args:
            names: all matrices of this rule, in the order of the model.
            updates: number of updates so far, the same for all matrices.
            seed: seed of the run.
        """
        return frozenset()

    def basis_keys(self, shape: Shape) -> tuple[str, ...]:
        """Return the keys of the result of :meth:`new_basis`, which are keys of the state."""
        return ()

    def basis_keys_of(self, state: State, shape: Shape) -> tuple[str, ...]:
        """Return the same for a state that an earlier version may have made with other keys."""
        return self.basis_keys(shape)

    def phase(self, index: int, count: int) -> int:
        """Return when matrix ``index`` of ``count`` refreshes; the result is passed to :meth:`refresh_due`."""
        return 0

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        """Return whether the next update needs a new basis, after ``updates`` updates."""
        return False

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        """Compute a new basis from the gradient of this update, without changing the state.

        Args:
            grad: (m, n), fp32.
            state: of this matrix.
            updates: number of updates so far, the same for all matrices.
            seed: seed of the run.
            name: name of the matrix. Key random numbers by seed, name and count of refreshes.
        """
        raise NotImplementedError(f"{self.name} keeps no basis")


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state, by key."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def tensor(state: State, key: str) -> Tensor:
    """Return an entry of a state that is known to be a tensor."""
    value = state[key]
    assert isinstance(value, Tensor)
    return value


def count(state: State, key: str) -> int:
    """Return an entry of a state that is known to be an integer."""
    value = state[key]
    assert isinstance(value, int)
    return value
