"""Operations on whole factors."""

from megalr.ops.refactorize import Refactorized, refactorize, transport_moments

__all__ = ["Refactorized", "refactorize", "transport_moments"]
