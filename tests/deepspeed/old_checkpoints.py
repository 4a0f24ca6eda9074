"""What the ranks run in the test of old checkpoints: write one, or load one and describe every bit of what was loaded.

Everything that a stored checkpoint depends on is here, the model too, so that no other test can change it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import megalr
from megalr.optim.state import entries_of, numbers_of

FOLDER = Path(__file__).parents[1] / "fixtures" / "checkpoints"
WIDTH, INNER, VOCABULARY = 12, 18, 31
SEQUENCES, LENGTH = 8, 10
BEFORE, AFTER = 7, 3  # updates; each method has an event of its own among the last ones
LAYERS = {"rank": 4, "target_modules": ["mlp"]}
WARMUP = {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 4, "cos_min_ratio": 0.1}}
ADAMW = {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.1, "embedding": {"lr": 1e-2}}}
BF16 = {"bf16": {"enabled": True}}
# Who writes the checkpoint, ZeRO stage, processes, and what the JSON has beside the common sections.
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "megalr-galore": (
        "megalr",
        2,
        2,
        {
            "optimizer": {
                "type": "GaLoreAdamW",
                "params": {"lr": 1e-2, "weight_decay": 0.1, "rank": 4, "update_proj_gap": 4, "adamw": {"lr": 3e-3}},
            },
            "megalr": {"guards": {"window": 5, "spike_deviations": 8.0}},
        },
    ),
    "megalr-projected-bf16": (
        "megalr",
        1,
        2,
        {
            **BF16,
            "megalr": {
                "parametrization": {
                    "type": "projected",
                    "update_proj_gap": 4,
                    "moments": "transport",
                    "merge_rounding": "remainder",
                    **LAYERS,
                }
            },
        },
    ),
    "megalr-switchlora-bf16": (
        "megalr",
        1,
        2,
        {
            **BF16,
            "megalr": {
                "parametrization": {
                    "type": "switchlora",
                    "switch_interval": 2,
                    "frozen_steps": 1,
                    "merge_rounding": "remainder",
                    **LAYERS,
                }
            },
        },
    ),
    "deepspeed-low-rank": (
        "deepspeed",
        1,
        1,
        {
            "megalr": {
                "parametrization": {"type": "low_rank", "alpha": 8, **LAYERS},
                "refactorization": {"interval": 4, "moments": "transport"},
                "momentum_reset": {"interval": 6, "scope": "factors", "warmup_steps": 4},
            }
        },
    ),
    "deepspeed-projected-bf16": (
        "deepspeed",
        1,
        1,
        {
            **BF16,
            "megalr": {
                "parametrization": {
                    "type": "projected",
                    "update_proj_gap": 4,
                    "moments": "reset",
                    "merge_rounding": "remainder",
                    **LAYERS,
                }
            },
        },
    ),
    "deepspeed-relora": (
        "deepspeed",
        1,
        1,
        {"megalr": {"parametrization": {"type": "relora", "merge_every": 3, "restart_warmup_steps": 2, **LAYERS}}},
    ),
    "deepspeed-loro": (
        "deepspeed",
        1,
        1,
        {"megalr": {"parametrization": {"type": "loro", "exact_every": 4, "restart_warmup_steps": 2, **LAYERS}}},
    ),
    "deepspeed-switchlora": (
        "deepspeed",
        1,
        1,
        {"megalr": {"parametrization": {"type": "switchlora", "switch_interval": 2, "frozen_steps": 1, **LAYERS}}},
    ),
    "deepspeed-velora": (
        "deepspeed",
        1,
        1,
        {"megalr": {"activations": {"groups": 6, "target_modules": ["mlp"]}}},
    ),
    "deepspeed-q-galore": (
        "deepspeed",
        1,
        1,
        {
            "optimizer": {
                "type": "QGaLoreAdamW",
                "params": {
                    "lr": 1e-2,
                    "rank": 4,
                    "update_proj_gap": 4,
                    "min_8bit_size": 64,
                    "queue_size": 1,
                    "cos_threshold": 0.1,
                    "eps": 1e-6,  # the default of that time
                    "adamw": {"lr": 3e-3},
                },
            }
        },
    ),
}


class Small(nn.Module):
    """Tokens in, next-token loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.mlp_up = nn.Linear(WIDTH, INNER)
        self.mlp_down = nn.Linear(INNER, WIDTH, bias=False)
        self.mlp_square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            spread = 1 / math.sqrt(parameter.shape[-1])
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator).sub_(0.5).mul_(2 * spread))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)  # (sequences, length, WIDTH)
        x = x + self.mlp_square(torch.tanh(x))
        x = x + self.mlp_down(torch.tanh(self.mlp_up(x)))
        logits = self.lm_head(self.norm(x))
        return functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), ids[:, 1:].reshape(-1))


def write(case: str) -> None:
    """Train, save; write down what was loaded, and where training leads from there."""
    folder = FOLDER / case
    engine = _engine(case)
    _train(engine, range(BEFORE))
    if CASES[case][0] == "megalr":
        torch.manual_seed(10 + dist.get_rank())
        megalr.save_checkpoint(engine, folder, "saved", client_state={"position": BEFORE})
    else:
        engine.save_checkpoint(str(folder), "saved", client_state={"position": BEFORE})
    engine.destroy()
    seen, weights = load(case)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, seen)
    if weights is not None:
        (folder / "expected.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        torch.save(weights, folder / "after.pt")
        for script in folder.glob("zero_to_*.py"):
            script.unlink()


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """What this rank has after a load, and on rank 0 the masters after further updates."""
    engine = _engine(case)
    folder = str(FOLDER / case)
    if CASES[case][0] == "megalr":
        _train(engine, range(20, 22))  # what is loaded replaces what was there
        loaded = megalr.load_checkpoint(engine, folder, "saved")
        client, dropped = dict(loaded.client_state), loaded.dropped
    else:
        path, client = engine.load_checkpoint(folder, "saved")
        client, dropped = {"position": client["position"]}, "" if path else "everything"
    seen = {**_seen(engine), "client": client, "dropped": dropped}
    if CASES[case][0] == "megalr":  # DeepSpeed's keep neither
        seen |= {"guard": engine.megalr_guard.state_dict(), "random": torch.rand(3).tolist()}
    _train(engine, range(BEFORE, BEFORE + AFTER))
    weights = megalr.consolidated_state_dict(engine)
    engine.destroy()
    return seen, weights


def _engine(case: str) -> Any:
    _, stage, world, changes = CASES[case]
    assert dist.get_world_size() == world
    config = copy.deepcopy(
        {
            "train_batch_size": SEQUENCES,
            "train_micro_batch_size_per_gpu": SEQUENCES // world,
            "gradient_clipping": 0.5,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage},
            "optimizer": ADAMW,
            "scheduler": WARMUP,
            **changes,
        }
    )
    return megalr.initialize(model=Small(), config=config)[0]


def _train(engine: Any, updates: range) -> None:
    rows = slice(*(SEQUENCES * i // dist.get_world_size() for i in (dist.get_rank(), dist.get_rank() + 1)))
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
        engine.backward(engine(ids[rows]))
        engine.step()


def _seen(engine: Any) -> dict[str, Any]:
    """Numbers as they are, and of each tensor a hash of all bits, their types and their places."""
    optimizer = engine.basic_optimizer
    hashes = {f"model/{name}": _hash([((), tensor)]) for name, tensor in engine.module.state_dict().items()}
    numbers = numbers_of(optimizer)
    for key, entry in entries_of(optimizer, once=False).items():
        hashes[key] = _hash([(piece.offsets, piece.data) for piece in entry.pieces])
    seen = {
        "numbers": numbers,
        "hashes": hashes,
        "rates": engine.get_lr(),
        "schedule": engine.lr_scheduler.state_dict(),
        "counts": [engine.global_steps, engine.global_samples, engine.skipped_steps],
    }
    return dict(json.loads(json.dumps(seen)))


def _hash(pieces: list[tuple[tuple[int, ...], Tensor]]) -> str:
    digest = hashlib.sha256()
    for offsets, data in sorted(pieces, key=lambda piece: piece[0]):
        digest.update(repr((offsets, tuple(data.shape), data.dtype)).encode())
        digest.update(data.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
