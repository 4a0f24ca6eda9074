"""Runs the Python of the guides, page by page, as one process with a small model: ``python -m`` this, in a new folder.

A page's snippets share their names, as a reader's script would. What a snippet takes for granted (a model, ``ds.json``,
an engine, rows to train on) is made before it; after it, an engine that it has made trains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import megalr
from megalr.checkpoint.__main__ import main as checkpoint_tool
from megalr.data.tokenizer import EMBEDDED_TOKENIZER
from megalr.processes import free_port
from tests.unit.test_guides import DOCS, blocks

GUIDES = DOCS / "guides"
SIZES = {"hidden_size": 128, "intermediate_size": 144, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = torch.randint(4096, (4, 16), generator=torch.Generator().manual_seed(0))
GALORE = {"type": "GaLoreAdamW", "params": {"lr": 1e-2, "rank": 16}}
Names = dict[str, Any]


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=4096, max_position_embeddings=32))


def write_json(content: Any) -> None:
    base = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    Path("ds.json").write_text(json.dumps({**base, **content}), encoding="utf-8")


def engine() -> Any:
    write_json({"optimizer": GALORE})
    return megalr.initialize(model=model(), config="ds.json")[0]


def train(engine: Any, updates: int = 2) -> None:
    for _ in range(updates):
        engine.backward(engine(input_ids=ROWS, labels=ROWS).loss)
        engine.step()


def plug_into_a_job(snippets: list[str], texts: list[Any]) -> None:
    for snippet, content in zip(snippets, texts, strict=False):
        write_json(content)
        names: Names = {"model": model()}
        exec(snippet, names)
        train(names["engine"])
        assert names["engine"].megalr_guard.skipped == 0


def trainer_and_clients(snippets: list[str], _: list[Any]) -> None:
    trainer, read = snippets
    names: Names = {"model": model(), "train": [{"input_ids": row, "labels": row} for row in ROWS] * 4}
    exec(trainer, names)
    names["trainer"].train()
    names["engine"] = names["trainer"].model_wrapped
    exec(read, names)
    assert names["weights"]["model.embed_tokens.weight"].shape == (4096, 128)
    unset_hf_deepspeed_config()  # else stage 3 would cut every later model


def long_runs(snippets: list[str], _: list[Any]) -> None:
    guard, write, adopt = snippets
    write_json({"megalr": {"optimizer": GALORE}})
    net = model()
    optimizer = megalr.build_optimizer(net, "ds.json")
    bare, *_others = deepspeed.initialize(model=net, optimizer=optimizer, config="ds.json")
    names: Names = {"engine": bare, "megalr": megalr, "torch": torch}
    for snippet in (guard, write, adopt):
        exec(snippet, names)
        train(bare)
    assert names["guard"].skipped == 0


def checkpoints(snippets: list[str], _: list[Any]) -> None:
    names: Names = {"engine": engine(), "megalr": megalr}
    for snippet in snippets:
        train(names["engine"])
        exec(snippet, names)
    assert names["loaded"].updates == 2
    assert (
        checkpoint_tool(["export", "checkpoints", "my-model", "--to", "hf", "--tokenizer", str(EMBEDDED_TOKENIZER)])
        == 0
    )


def getting_started(snippets: list[str], _: list[Any]) -> None:
    for snippet in snippets:  # of the model that the page on checkpoints has exported
        exec(snippet, {})


def tensor_parallelism(snippets: list[str], _: list[Any]) -> None:
    write_json({"optimizer": GALORE})
    for snippet in snippets:
        exec(snippet, {"model": model(), "megalr": megalr})


def own_rules_and_layers(snippets: list[str], texts: list[Any]) -> None:
    Path("my_rules.py").write_text(snippets[0], encoding="utf-8")
    for content in texts[:1]:
        write_json(content)
        train(megalr.initialize(model=model(), config="ds.json")[0])


PAGES: dict[str, Callable[[list[str], list[Any]], None]] = {
    page.__name__: page
    for page in (
        plug_into_a_job,
        trainer_and_clients,
        long_runs,
        checkpoints,
        getting_started,
        tensor_parallelism,
        own_rules_and_layers,
    )
}


def main() -> None:
    """Run them, and print a line for each page."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    deepspeed.init_distributed("gloo")
    for name, page in PAGES.items():
        path = next(path for path in (GUIDES / f"{name}.md", DOCS / f"{name}.md") if path.exists())
        snippets = blocks(path, "python")
        page(snippets, [json.loads(text) for text in blocks(path, "json")])
        print(f"{name}: {len(snippets)} snippets", flush=True)


if __name__ == "__main__":
    main()
