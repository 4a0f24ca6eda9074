"""What the ranks run in the test of pipeline stages: a small language model under DeepSpeed's PipelineModule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

import megalr
from megalr.hosts.tensor_parallel import mark_cut
from tests.deepspeed import rule_training
from tests.deepspeed.rule_training import SEQUENCES, batches
from tests.deepspeed.tensor_training import tensor_parallel_groups
from tests.deepspeed.training import VOCABULARY, configuration

HIDDEN, SEED, MICRO_BATCHES = 20, 5, 2
CLIPPING, ILL = 0.1, 2


class Block(nn.Module):
    """x + W2 tanh(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(HIDDEN, 37, bias=False)
        self.mlp_down = nn.Linear(37, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp_down(torch.tanh(self.mlp_up(x)))


LAYERS = [
    LayerSpec(nn.Embedding, VOCABULARY, HIDDEN),
    LayerSpec(Block),
    LayerSpec(Block),
    LayerSpec(nn.Linear, HIDDEN, VOCABULARY, bias=False),
]


def _head(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return hidden @ embedding.weight.T


TIED = [
    TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, HIDDEN),
    *LAYERS[1:-1],
    TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, HIDDEN, forward_fn=_head),
]


class Plain(nn.Sequential):
    """The same layers in one process."""

    def __init__(self) -> None:
        layers = []
        for index, spec in enumerate(LAYERS):
            torch.manual_seed(SEED + index)
            layers.append(spec.build())
        super().__init__(*layers)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        logits = super().forward(input_ids)
        return CausalLMOutput(loss=loss_of(logits, labels), logits=logits)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each next token."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def settings(optimizer: str) -> dict[str, Any]:
    """Of a rule on the blocks' matrices, without what depends on names, which are numbers in a pipeline.

    Refreshes are not staggered, because each stage spreads those of its own matrices.
    """
    given = {k: v for k, v in rule_training.RULES[optimizer].items() if k != "embedding"}
    return given | ({"stagger": False} if "update_proj_gap" in given else {})


def train(stage: int, optimizer: str, ill: int | None = None, clip: float = CLIPPING) -> dict[str, Tensor] | None:
    """Two pipeline stages on half of the ranks each; the first rank of either returns its layers' masters.

    Args:
        stage: of ZeRO.
        optimizer: of the blocks' matrices.
        ill: a pipeline stage one of whose gradients is no number in the update ``ILL``; None: it is left out.
        clip: the largest norm.
    """
    with tensor_parallel_groups():
        model = PipelineModule(LAYERS, num_stages=2, loss_fn=loss_of, seed_layers=True, base_seed=SEED, seed_fn=_seed)
        config = configuration(stage, gradient_clipping=clip)
        data_size = dist.get_world_size() // 2
        config["train_batch_size"] = SEQUENCES
        config["train_micro_batch_size_per_gpu"] = SEQUENCES // MICRO_BATCHES // data_size
        config["gradient_accumulation_steps"] = MICRO_BATCHES
        config["optimizer"] = {"type": optimizer, "params": settings(optimizer)}
        del config["megalr"]
        engine = megalr.initialize(model=model, config=config)[0]
        rank = engine.grid.get_data_parallel_rank()
        for update, ids in enumerate(batches(rule_training.STEPS)):
            hook = None
            if update == ILL and ill == engine.stage_id:
                hook = next(engine.module.parameters()).register_hook(lambda grad: grad * float("nan"))
            if update != ILL or ill is not None:
                engine.train_batch(iter(_rows(ids, rank, data_size, engine.train_micro_batch_size_per_gpu())))
            if hook is not None:
                hook.remove()
        assert engine.skipped_steps == (ill is not None)
        weights = megalr.consolidated_state_dict(engine)
        engine.destroy()
    return weights


def refused(stage: int, how: str) -> str:
    """The message of a pipeline that cannot work: tensor parallelism, guards, ...; empty where it starts."""
    with tensor_parallel_groups():
        axes = {"num_stages": 2}
        if how == "topology":
            axes = {"topology": PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)}
        layers = TIED if how == "tied" else LAYERS
        model = PipelineModule(layers, loss_fn=loss_of, seed_layers=True, base_seed=SEED, seed_fn=_seed, **axes)
        config = configuration(stage)
        config["optimizer"] = {"type": "GaLoreAdamW", "params": settings("GaLoreAdamW")}
        del config["megalr"]
        if how == "topology":
            mark_cut(next(model.parameters()), 0)
        elif how == "guards":
            config["megalr"] = {"guards": {"spike_deviations": 3}}
        elif how == "block":
            config["optimizer"] = {"type": "BAdam"}
        elif how == "tied":
            config["optimizer"]["params"] |= {"stagger": True, "embeddings": True, "update_proj_gap": 4}
        elif how == "uneven":
            config["optimizer"] = {"type": "AdamW"}  # the first stage alone has an embedding beside its matrices
        else:
            config["tensor_parallel"] = {"autotp_size": 2}
        config["train_micro_batch_size_per_gpu"] = config["train_batch_size"] // (dist.get_world_size() // 2)
        try:
            megalr.initialize(model=model, config=config)[0].destroy()
        except megalr.UserError as error:
            return str(error)
    return ""


def _rows(ids: Tensor, rank: int, data_size: int, micro: int) -> Iterator[tuple[Tensor, Tensor]]:
    for a in range(MICRO_BATCHES):
        begin = (a * data_size + rank) * micro
        rows = ids[begin : begin + micro]
        yield rows, rows


def _seed(number: Any) -> None:
    torch.manual_seed(int(number))  # DeepSpeed counts layers in NumPy's numbers
