"""Operations on many tensors at once: compiled from csrc/ where that can be had, else torch calls."""

from megalr.ops.adam import low_rank_adam, momentum_reset, projected_adam, stable_spam_adam
from megalr.ops.refactorization import Refactorized, refactorize, refactorize_, transport_moments

__all__ = [
    "Refactorized",
    "low_rank_adam",
    "momentum_reset",
    "projected_adam",
    "refactorize",
    "refactorize_",
    "stable_spam_adam",
    "transport_moments",
]
