"""ReLoRA's merges: W0 takes over s B A, and the factors, their moments and their learning rate start again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalr.layers.base import Parametrization
from megalr.layers.lora import LoraLinear, draw_a_
from megalr.layers.relora import ReloraConfig
from megalr.layout.exchange import Exchange, run_of, write
from megalr.layout.layout import Fragment
from megalr.layout.shard import Shard
from megalr.optim.events.base import LayerEvents, Moments
from megalr.optim.frozen_weights import FrozenWeights
from megalr.seeding import generator
from megalr.timing import span


class Merges(LayerEvents):
    """The merges of a model's ReLoRA layers, all after the same updates."""

    parametrization: ClassVar[type[Parametrization]] = ReloraConfig
    rewrites: ClassVar[str] = 'a merge of ReLoRA sets B to zero and draws A anew; "type": "lora" makes no merges'

    def __init__(self, layers: Mapping[str, Any], config: ReloraConfig, seed: int) -> None:
        """
        Args:
            layers: the model's, by qualified name; those whose factors are not trained are left alone.
            config: the "parametrization" section.
            seed: key of the new A, of random pruning and of stochastic rounding.
        """
        self.restart_warmup_steps = config.restart_warmup_steps
        self.remainders: dict[str, Tensor] = {}
        self._layers: dict[str, LoraLinear] = {name: layer for name, layer in layers.items() if layer.B.requires_grad}
        self._config, self._seed = config, seed
        self._merges = 0

    @property
    def made(self) -> int:
        return self._merges

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        super().attach(shard, exchange, moments)
        self.frozen_weights = FrozenWeights(
            self._config.merge_rounding, shard, exchange, self._seed, self.remainders, "B"
        )

    def resets_due(self, updates: int) -> set[str]:
        return {"factors"} if self.due(updates) and self._config.moments == "reset" else set()

    def restarts_due(self, updates: int) -> set[str]:
        return {"factors"} if self.due(updates) else set()

    def end_update(self, updates: int) -> list[int]:
        if not self.due(updates):
            return []
        self._merges += 1
        changed: set[int] = set()
        with span("merge"):
            for name, layer in self._layers.items():
                self._merge(name, layer)
                if self._config.moments in ("magnitude", "random"):
                    for factor in layer.factors:
                        self._prune(f"{name}.{factor}")
                changed |= {f.buffer for factor in layer.factors for f in self._shard.layout.of(f"{name}.{factor}")}
        return sorted(changed)

    def numbers(self) -> dict[str, Any]:
        return {"merges": self._merges}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        self._merges = numbers["merges"]

    def merged(self) -> dict[str, Tensor]:
        return {name: layer.frozen_weight for name, layer in self._layers.items()}

    def due(self, updates: int) -> bool:
        return updates % self._config.merge_every == 0

    def _merge(self, name: str, layer: LoraLinear) -> None:
        masters = self._shard.buffers
        b, a = (self._exchange.everywhere(f"{name}.{factor}", masters) for factor in ("B", "A"))
        # Of the masters: what the model's dtype has cut off the factors is not lost as well.
        self.frozen_weights.take(
            name, layer.frozen_weight, (b.float() * layer.scale) @ a.float(), decay=1.0, count=self._merges
        )
        for fragment in self._own(f"{name}.B"):
            run_of(masters, fragment).zero_()
        draw_a_(a, self._seed, name, self._merges)
        write(self._shard.layout.flat(f"{name}.A", a), masters, self._own(f"{name}.A"))

    def _prune(self, name: str) -> None:
        """Zero a share of a factor's moments."""
        moments = {key: self._moments(key) for key in ("exp_avg", "exp_avg_sq")}
        ratio, numel = self._config.prune_ratio, self._shard.layout.numel(name)
        if self._config.moments == "random":
            drawn = torch.rand(numel, generator=generator(self._seed, name, "prune", self._merges))
            kept = {key: drawn > ratio for key in moments}
        else:
            kept = {key: _largest(self._exchange.everywhere(name, field), ratio) for key, field in moments.items()}
            kept["exp_avg"] &= kept["exp_avg_sq"]
        for key, field in moments.items():
            for fragment in self._own(name):
                run = run_of(field, fragment)
                run.mul_(kept[key][fragment.start : fragment.start + fragment.length].to(run.device))

    def _own(self, name: str) -> Sequence[Fragment]:
        return self._shard.layout.on(name, self._shard.rank)


def _largest(moments: Tensor, ratio: float) -> Tensor:
    """Where a flat tensor is above its ``ratio`` quantile in magnitude."""
    size = moments.reshape(-1).abs()
    # torch.quantile refuses more than 2^24 elements; what lies above the interpolated quantile is the same.
    return size > size.kthvalue(int(ratio * (size.numel() - 1)) + 1).values
