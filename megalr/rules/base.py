"""What a rule is: the update of one whole matrix, from its gradient and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

Shape = tuple[int, int]
# Tensors and plain numbers, so that a checkpoint of it loads with ``weights_only=True``.
State = dict[str, Tensor | int]
# The state's tensors that a refresh replaces, by key.
Basis = dict[str, Tensor]


class Rule(ABC):
    """The update of an m x n matrix W, decoupled from learning rate and weight decay: W -= lr (update + λ W).

    A rule sees whole matrices and knows nothing of ranks. Its hyper-parameters are the keyword-only fields of a frozen
    dataclass, so one instance serves every matrix; what belongs to one matrix is in its :data:`State`, fp32 throughout.

    A basis is computed apart from the update, by :meth:`new_basis`: it is the costly part, and singular vectors are
    not reproducible across machines, so where several ranks hold the same state one computes and the others receive.
    """

    # The JSON's "type", for rules of this package; a user's rule has the name that it is registered under.
    type_name: ClassVar[str]
    # In checkpoints, tables and messages.
    name: ClassVar[str]
    # Where the original's defaults are not AdamW's.
    default_lr: ClassVar[float] = 1e-3
    default_eps: ClassVar[float] = 1e-8
    # Inherited hyper-parameters that mean nothing to this rule, so that nobody sets them in vain.
    unused: ClassVar[frozenset[str]] = frozenset()
    # Keys of the state that a momentum reset makes zero: moments, and the counts that correct their bias.
    reset_keys: ClassVar[tuple[str, ...]] = ()
    # Keys of the state that are linear in the matrix's gradients, of a rule that keeps nothing else of them: what maps
    # gradients into other coordinates carries the state exactly.
    linear_keys: ClassVar[tuple[str, ...]] = ()
    # Settings that stood for something else, where the JSON leaves them out, when checkpoints did not name them yet.
    former_defaults: ClassVar[Mapping[str, object]] = {}
    # Why the rule cannot train the factors of a low-rank layer; empty where it can.
    not_for_factors: ClassVar[str] = ""
    # Whether it also takes a vector among those factors, as a matrix with one row.
    takes_vectors: ClassVar[bool] = False

    def for_head(self) -> Rule:
        """The rule as the output head has it, where it is given the head."""
        return self

    def for_embedding(self) -> Rule:
        """The rule as an embedding has it, where it is given the embeddings."""
        return self

    def scheduled(self, factor: float) -> Rule:
        """The rule at a moment of the learning rate's schedule, where more than the step depends on it.

        Args:
            factor: this update's learning rate over that of the JSON.
        """
        return self

    @abstractmethod
    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        """The state of an m x n matrix before its first update."""

    def room(self, numbers: Mapping[str, int], shape: Shape, device: torch.device | str) -> State:
        """A state to read saved tensors into; a rule whose states have had other shapes tells them by their numbers.

        Args:
            numbers: of the saved state.
            shape: (m, n).
            device: of the tensors.
        """
        return self.init_state(shape, device) | dict(numbers)

    @abstractmethod
    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        """One update.

        Args:
            grad: (m, n), fp32, finite; left as it is.
            state: of this matrix; modified in place.
            basis: what :meth:`new_basis` gave, when :meth:`refresh_due`; else None.

        Returns:
            (m, n), fp32: what the learning rate multiplies.
        """

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        """W -= lr · :meth:`update`, in place, for a rule that can do it without forming the update.

        Args:
            weight: W, (m, n), fp32.
            grad, state, basis: as for :meth:`update`.
            lr: learning rate.
        """
        weight.add_(self.update(grad, state, basis), alpha=-lr)

    def reset(self, state: State) -> None:
        """Momentum reset: what :attr:`reset_keys` names becomes zero, in place; everything else stays as it is."""
        for key in self.reset_keys:
            value = state[key]
            state[key] = value.zero_() if isinstance(value, Tensor) else 0

    @abstractmethod
    def state_numel(self, shape: Shape) -> int:
        """Elements of all tensors of an m x n matrix's state."""

    def state_bytes(self, shape: Shape) -> int:
        """Bytes of the same."""
        return 4 * self.state_numel(shape)

    @abstractmethod
    def flops(self, shape: Shape) -> float:
        """Leading floating-point operations of an average update; what owners are balanced by, with the state."""

    def form(self) -> dict[str, str | int | bool]:
        """The rule's name, and those of its settings that decide what its state looks like."""
        return {"rule": self.name}

    def logical_form(self) -> dict[str, str | int | bool]:
        """The same but for how numbers are stored: rules alike in this go on with each other's states."""
        return self.form()

    def convert(self, state: State, shape: Shape) -> State:
        """The state of an m x n matrix as this rule keeps it, which may share tensors with what is given.

        Args:
            state: as a rule with the same :meth:`logical_form` keeps it.
            shape: (m, n).
        """
        return state

    def rank_of(self, shape: Shape) -> int | None:
        """The rank that an m x n matrix is projected to; None for a rule without projection."""
        return None

    def resting(self, names: Sequence[str], updates: int, seed: int) -> frozenset[str]:
        """Those of its matrices that the update after ``updates`` others leaves alone; they have no state then.

        Args:
            names: of all matrices of this rule, in the model's order.
            updates: made so far, of all matrices alike.
            seed: the run's seed.
        """
        return frozenset()

    def basis_keys(self, shape: Shape) -> tuple[str, ...]:
        """The keys of what :meth:`new_basis` gives, which are keys of the state."""
        return ()

    def basis_keys_of(self, state: State, shape: Shape) -> tuple[str, ...]:
        """The same of a state, which an earlier version may have made with other keys."""
        return self.basis_keys(shape)

    def phase(self, index: int, count: int) -> int:
        """When the ``index``-th of ``count`` matrices refreshes; handed back to :meth:`refresh_due`."""
        return 0

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        """Whether the next update needs a new basis; ``updates`` have been made, of all matrices alike."""
        return False

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        """A new basis from this update's gradient; the state is left as it is.

        Args:
            grad: (m, n), fp32.
            state: of this matrix.
            updates: made so far, of all matrices alike.
            seed: the run's seed.
            name: the matrix's name; with the seed and the count of refreshes the key of any random number.
        """
        raise NotImplementedError(f"{self.name} keeps no basis")


def tensors_of(state: State) -> dict[str, Tensor]:
    """The tensors of a state, by key."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def tensor(state: State, key: str) -> Tensor:
    """A state's entry that is known to be a tensor."""
    value = state[key]
    assert isinstance(value, Tensor)
    return value


def count(state: State, key: str) -> int:
    """A state's entry that is known to be a count."""
    value = state[key]
    assert isinstance(value, int)
    return value
