"""A small ZeRO engine: what DeepSpeed does around ``optimizer.step()``, on ranks that are threads; see threads.py.

It takes DeepSpeed's JSON and calls the optimizer as DeepSpeed does: at stage 0 once for the model's own parameters, at
stages 1 and 2 once for each group, at stage 3 once for each sub-group. ``tests/deepspeed/test_world_engine.py`` holds
its layouts and its weights against DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megalr
from megalr.config.settings import MegalrConfig
from megalr.hosts.base import Host, NamedGroup
from megalr.layers.replacement import factor_pairs, replaced_layers
from megalr.layers.velora import compressed_layers
from megalr.layout.planned import planned_layout
from megalr.layout.shard import Shard, Twin
from megalr.optim.events.registry import layer_events
from megalr.optim.events.velora import Directions
from megalr.optim.foreign import attend
from megalr.optim.groups import parameter_groups
from megalr.optim.optimizer import MegalrOptimizer


class Engine:
    """A model, its optimizer and its masters on one rank.

    What is not trained is whole on every rank at every stage.

    Attributes:
        module: the model, whole on every rank, as it computes.
        basic_optimizer: the optimizer, under DeepSpeed's name for it.
        stage: of ZeRO.
        looks: whether the engine itself skips updates with a gradient that is not finite, as DeepSpeed does at stages
            1 to 3. Where it does not, the optimizer has to.
        skipped: updates that the engine has skipped.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], *, looks: bool | None = None) -> None:
        """
        Args:
            model: dense, this rank's own copy, the same on every rank.
            config: a DeepSpeed JSON; of it are read the stage, "sub_group_size", "gradient_accumulation_steps",
                "gradient_clipping", "bf16", "optimizer" and "megalr".
            looks: see above; None: as DeepSpeed at this stage.
        """
        zero = config.get("zero_optimization", {})
        self.stage: int = zero.get("stage", 0)
        self.looks = self.stage > 0 if looks is None else looks
        self.skipped = 0
        self._accumulation: int = config.get("gradient_accumulation_steps", 1)
        self._clip: float = config.get("gradient_clipping", 0.0)
        self._passes = 0
        self.module = megalr.parametrize(model, config)
        host = _WorldHost(self)
        self.basic_optimizer = optimizer_of(self.module, config, host)
        if config.get("bf16", {}).get("enabled"):
            self.module.bfloat16()
        self._groups = [group["params"] for group in self.basic_optimizer.param_groups]
        self._flatten(zero.get("sub_group_size", 10**9))
        self._gradient = torch.zeros(sum(p.numel() for p in self._parameters.values()))
        self.basic_optimizer.prepare()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches an update."""
        return self._accumulation

    def backward(self, loss: Tensor) -> None:
        """One micro-batch's backward pass; at stages 2 and 3 its gradients are averaged over the ranks at once."""
        (loss / self._accumulation).backward()
        self._passes += 1
        if self.stage >= 2:
            self._reduce()

    def step(self) -> None:
        """After an update's last micro-batch: clip, step the optimizer, bring the new weights to every rank."""
        if self._passes % self._accumulation != 0:
            return
        if self.stage < 2:
            self._reduce()
        norm = self._gradient.norm()
        if self.looks and not torch.isfinite(norm):
            self.skipped += 1
        else:
            if self._clip:
                self._gradient.mul_(1.0 / torch.clamp((norm + 1e-6) / self._clip, min=1.0))
            self._step()
        self._gradient.zero_()
        self.basic_optimizer.begin_update()  # as hosts.watch has DeepSpeed do after every update

    def publish(self, buffer: int) -> None:
        """Cast one buffer's masters to the weights of this rank's part."""
        if self._parts[buffer] is not self.masters[buffer]:
            self._parts[buffer].data.copy_(self.masters[buffer].data)

    def state_dict(self) -> dict[str, Any]:
        """What DeepSpeed's own checkpoints hold of this rank: the optimizer's state, masters, weights; copies."""
        self._show_all()
        state = {
            "optimizer": self.basic_optimizer.state_dict(),
            "masters": [master.data for master in self.masters],
            "module": self.module.state_dict(),
        }
        self._hide_all()
        return _copied(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave at the same stage and world size; the optimizer's before the rest."""
        state = _copied(state)
        self._show_all()
        self.basic_optimizer.load_state_dict(state["optimizer"])
        self._hide_all()
        self.module.load_state_dict(state["module"])
        for buffer, master in enumerate(state["masters"]):
            self.masters[buffer].data.copy_(master)
            self.publish(buffer)
        self.share_weights()

    def gradients(self) -> list[Tensor]:
        """This rank's part of the averaged gradients, by buffer."""
        return [self._cut(buffer) for buffer in range(len(self.masters))]

    def _flatten(self, sub_group_size: int) -> None:
        """Make masters: flat parts, or at stage 0 whole tensors, which in fp32 are the model's own."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        groups = [{names[id(p)]: p for p in group} for group in self._groups]
        cut = [_sub_groups(group, sub_group_size) if self.stage == 3 else [group] for group in groups]
        self._group_of = [i for i, group in enumerate(cut) for _ in group]
        self._parameters: dict[str, nn.Parameter] = {n: p for group in groups for n, p in group.items()}
        shapes = [{n: tuple(p.shape) for n, p in sub_group.items()} for group in cut for sub_group in group]
        self.layout = planned_layout(shapes, stage=self.stage, world_size=dist.get_world_size())
        self._own = [f for f in self.layout.fragments if f.rank == dist.get_rank()]
        parameters = list(self._parameters.values())
        self.masters: list[Tensor]
        self._parts: list[Tensor]  # the masters in the weights' dtype, of which the other ranks get copies
        if self.stage == 0:
            self._parts = parameters
            self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.data.float()) for p in parameters]
            pairs = zip(self.basic_optimizer.param_groups, self._groups, strict=True)
            master_of = {id(p): master for p, master in zip(parameters, self.masters, strict=True)}
            for group, given in pairs:
                group["params"] = [master_of[id(p)] for p in given]
            return
        sizes = [0] * len(shapes)
        for f in self.layout.fragments:
            sizes[f.buffer] = max(sizes[f.buffer], f.offset + f.length)
        self.masters = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for f in self._own:
            here = self.masters[f.buffer].data[f.offset : f.offset + f.length]
            here.copy_(self._parameters[f.name].data.view(-1)[f.start : f.start + f.length])
        self._parts = [master.data.to(parameters[0].dtype) for master in self.masters]
        self._show_all()
        self._hide_all()

    def _reduce(self) -> None:
        """Add the gradients' average over the ranks to those of this update."""
        parameters = self._parameters.values()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1).float() for grad in grads])
        for parameter in parameters:
            parameter.grad = None
        dist.all_reduce(flat)
        self._gradient += flat / dist.get_world_size()

    def _cut(self, buffer: int) -> Tensor:
        sizes = [p.numel() for p in self._parameters.values()]
        whole = dict(zip(self._parameters, self._gradient.split(sizes), strict=True))
        flat = torch.zeros(self.masters[buffer].numel())
        for f in self._own:
            if f.buffer == buffer:
                flat[f.offset : f.offset + f.length] = whole[f.name][f.start : f.start + f.length]
        return flat.view_as(self.masters[buffer])

    def _step(self) -> None:
        optimizer = self.basic_optimizer
        if self.stage == 0:
            for buffer, master in enumerate(self.masters):
                master.grad = self._cut(buffer)
            optimizer.step()
            for buffer, master in enumerate(self.masters):
                self.publish(buffer)
                master.grad = None
            return
        groups = optimizer.param_groups
        for buffer, (master, index) in enumerate(zip(self.masters, self._group_of, strict=True)):
            master.grad = self._cut(buffer)
            if self.stage == 3:
                groups[index]["params"] = [master]
                optimizer.step()
                groups[index]["params"] = []
            else:
                optimizer.param_groups = [groups[index]]
                try:
                    optimizer.step()
                finally:
                    optimizer.param_groups = groups
            self.publish(buffer)
            master.grad = None
        self.share_weights()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Bring every rank's parts into the weights of all."""
        if self.stage == 0:
            return
        sizes = [part.numel() for part in self._parts]
        own = torch.cat(self._parts)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        parts_of = [part.split(sizes) for part in parts]
        for f in self.layout.fragments:
            weight = self._parameters[f.name].view(-1)[f.start : f.start + f.length]
            weight.copy_(parts_of[f.rank][f.buffer][f.offset : f.offset + f.length])

    def _show_all(self) -> None:
        """All masters in the optimizer's groups, as DeepSpeed has them for its checkpoints."""
        if self.stage > 0:
            for i, group in enumerate(self.basic_optimizer.param_groups):
                group["params"] = [m for m, index in zip(self.masters, self._group_of, strict=True) if index == i]

    def _hide_all(self) -> None:
        if self.stage == 3:
            for group in self.basic_optimizer.param_groups:
                group["params"] = []


class _WorldHost(Host):
    """Reads an :class:`Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read(self, named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> tuple[Shard, Shard]:
        engine = self._engine

        def twins() -> list[Twin]:
            if engine.stage == 0:
                pairs = zip(engine._parameters.items(), engine.masters, strict=True)
                return [Twin(n, p.data.view(-1), m.data.view(-1)) for (n, p), m in pairs if p is not m]
            found = []
            for f in engine._own:
                weight = engine._parameters[f.name].data.view(-1)[f.start : f.start + f.length]
                found.append(Twin(f.name, weight, engine.masters[f.buffer].data[f.offset : f.offset + f.length]))
            return found

        shard = Shard(
            engine.layout,
            [master.data.view(-1) for master in engine.masters],
            engine.masters,
            dist.get_rank(),
            dist.group.WORLD,
            engine.publish,
            None if engine.looks else engine.gradients,
            replicated=engine.stage == 0,
            twins=twins,
        )
        return shard, shard


def optimizer_of(model: nn.Module, config: dict[str, Any], host: Host) -> MegalrOptimizer:
    """What ``megalr.build_optimizer`` builds, for another engine."""
    parsed = MegalrConfig.from_json(config)
    compressed = compressed_layers(model)
    optimizer = MegalrOptimizer(
        parameter_groups(model, parsed.optimizer),
        parsed,
        pairs=list(factor_pairs(model)),
        events=layer_events(parsed.parametrization, replaced_layers(model), parsed.seed),
        activations=Directions(compressed) if compressed else None,
        host=host,
        model=model,
    )
    attend(model, optimizer)
    return optimizer


def _sub_groups(group: dict[str, nn.Parameter], size: int) -> list[dict[str, nn.Parameter]]:
    """A group cut as stage 3 does: parameters in order, a new sub-group after each that fills one."""
    found: list[dict[str, nn.Parameter]] = [{}]
    filled = 0
    for name, parameter in group.items():
        if filled >= size:
            found.append({})
            filled = 0
        found[-1][name] = parameter
        filled += -(-parameter.numel() // dist.get_world_size())
    return found


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list | tuple) else tree
