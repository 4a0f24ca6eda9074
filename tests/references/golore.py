"""GoLore, arXiv 2410.11289: GaLore whose bases are random from some update on."""

from __future__ import annotations

from tests.references.galore import GaLore


class GoLore(GaLore):
    """P of the leading singular vectors before ``random_from`` updates, uniformly random orthonormal afterwards."""

    type_name = "GoLoreAdamW"
    trained_with = {**GaLore.trained_with, "random_from": 6}
    short = {**GaLore.short, "random_from": 9}

    def __init__(
        self, shape: tuple[int, int], *, random_from: int, moments: str = "transport_first", **options
    ) -> None:
        super().__init__(shape, moments=moments, **options)
        self.random_from = random_from

    def projector_at(self, updates: int) -> str:
        return "random" if updates >= self.random_from else self.projector
