"""Recipes of a tiny comparison, and a launcher that trains nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalr.comparison import compare as program

SHAPE = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 64}

# In place of launchers/pretrain.py. What comes of a run follows from its rate and seed; a line is kept of every start.
FAKE = """
import json, os, pathlib, signal, sys, time
flags = sys.argv[1:]
value = lambda flag: flags[flags.index(flag) + 1]
folder = pathlib.Path(value("--output"))
params = json.loads(pathlib.Path(value("--deepspeed")).read_text())["optimizer"]["params"]
lr, seed = params["lr"], int(value("--seed"))
with (pathlib.Path(__file__).parent / "starts").open("a") as file:
    file.write(f"{lr:g} {seed}{' resumed' * ('--resume' in flags)}\\n")
folder.mkdir(parents=True, exist_ok=True)
time.sleep(params.get("weight_decay", 0.0))
row = lambda step, loss: json.dumps({"step": step, "tokens": 8 * step, "loss": loss}) + "\\n"
if lr == 7:
    print("something is broken")
    sys.exit(2)
if lr == 8:
    (folder / "metrics.jsonl").write_text(row(1, 5.0) + '{"step": 2, "lo')
    os.kill(os.getpid(), signal.SIGKILL)
if lr == 9:
    (folder / "metrics.jsonl").write_text(row(1, 5.0) + row(2, float("nan")))
    print("error: the loss is nan at step 2")
    sys.exit(2)
(folder / "metrics.jsonl").write_text("".join(row(step, 6 - step / 100) for step in range(1, 251)))
perplexity = 100 + abs(lr - 0.02) * 1000 + seed
summary = {"perplexity": perplexity, "perplexity_test": perplexity + 50 - 3 * seed, "tokens_per_second": 1234.5}
summary["perplexity_test_galore_compatible"] = summary["perplexity_test"] / 2
(folder / "summary.json").write_text(json.dumps(summary))
"""


def content(**changes):
    base = {
        "optimizer": {"params": {"eps": 1e-8, "embedding": {"lr": 1e-2}, "norm": {"lr": 3e-3}}},
        "zero_optimization": {"stage": 2},
    }
    projected = {"parametrization": {"type": "projected", "rank": 4}}
    given = {
        "model": "small.json",
        "steps": 3,
        "batch_size": 2,
        "sequence_length": 16,
        "seeds": [0, 1, 2],
        "base": base,
        "methods": {
            "AdamW": {"optimizer": {"type": "AdamW"}, "learning_rates": [0.01, 0.02, 0.04]},
            "projected": {"optimizer": {"type": "AdamW"}, "megalr": projected, "learning_rates": [0.01, 0.02, 9]},
        },
    }
    return {key: value for key, value in {**given, **changes}.items() if value is not None}


def compare(recipe, launchers, *flags, output=None):
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    output = output or recipe.parent / "out put"
    program.run(parser.parse_args(["--recipe", str(recipe), "--output", str(output), *flags]), launchers / "models")
    return output


def running(*words):
    """Command lines of this machine's processes that hold all the words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        found += [line] if all(word in line for word in words) else []
    return found


def starts(launchers):
    return (launchers / "starts").read_text().splitlines()


def method(**optimizer):
    return {"optimizer": optimizer or {"type": "AdamW"}, "learning_rates": [0.01]}
