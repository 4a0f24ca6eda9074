"""The HTML around the sections: head, header with the facts, navigation, footer."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalr.formatting import human_bytes
from megalr.train.lives import lives_of
from megalr.version import __version__
from megalr.webpage.axes import perplexity, short
from megalr.webpage.foreign import escaped, finite
from megalr.webpage.run import Run
from megalr.webpage.script import JAVASCRIPT
from megalr.webpage.style import CSS

STATES = {"finished": "✓ finished", "running": "▶ running", "stopped": "■ stopped"}
HINT = "Move over a chart to read values. Drag to zoom; double-click or press Esc to see everything again."


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: in its address; of letters.
        title: above it and in the navigation.
        html: its content.
    """

    name: str
    title: str
    html: str


def page(title: str, header: str, sections: Sequence[Section]) -> str:
    """A whole HTML document that loads nothing, and whose policy lets no script run but its own.

    Args:
        title: of the window; text.
        header: HTML above the navigation.
        sections: those without content are left out.
    """
    shown = [section for section in sections if section.html]
    digest = base64.b64encode(hashlib.sha256(JAVASCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    links = "".join(f'<a href="#{section.name}">{section.title}</a>' for section in shown)
    body = "".join(
        f'<section id="{section.name}"><h2>{section.title}</h2>{section.html}</section>' for section in shown
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<div class="page"><header>{header}</header><nav aria-label="Sections">{links}</nav>\n'
        f'<main><p class="note hint">{HINT}</p>{body}</main>\n'
        f"<footer>Written by megalr {escaped(__version__)} at {written}.</footer></div>\n"
        f"<script>{JAVASCRIPT}</script>\n</body>\n</html>\n"
    )


def header_of(run: Run) -> str:
    """Name, state, method and the most important numbers of a run."""
    tiles = "".join(
        f"<div{' class=main' if index == 0 else ''}><dt>{label}</dt><dd>{value}{_small(small)}</dd></div>"
        for index, (label, value, small) in enumerate(_facts(run))
    )
    notes = "".join(f"<p>{escaped(note, 600)}.</p>" for note in run.notes)
    warnings = f'<div class="warnings" role="note">{notes}</div>' if notes else ""
    method = method_of(run)
    return (
        f'<div class="top"><h1>{escaped(run.name)}</h1>{state_of(run)}</div>'
        + (f'<p class="method">{escaped(method, 600)}</p>' if method else "")
        + f'<dl class="facts">{tiles}</dl>{warnings}'
    )


def state_of(run: Run) -> str:
    """The state as a small label, in words and a sign as well as a color."""
    return f'<span class="state {run.state}">{STATES[run.state]}</span>'


def method_of(run: Run) -> str:
    """How the run trained, in a line of text; foreign text, not escaped."""
    config = run.section("deepspeed")
    section = _mapping(config.get("megalr"))
    optimizer = _mapping(section.get("optimizer")) or _mapping(config.get("optimizer"))
    layers = _mapping(section.get("parametrization"))
    words = [_name_of_model(run)]
    if layers.get("type") not in (None, "full"):
        words.append(f"{layers['type']} layers, rank {layers.get('rank', 'default')}")
    if isinstance(optimizer.get("type"), str):
        rank = _mapping(optimizer.get("params")).get("rank")
        words.append(optimizer["type"] + (f", rank {rank}" if isinstance(rank, int) else ""))
    stage = _mapping(config.get("zero_optimization")).get("stage")
    if isinstance(stage, int):
        words.append(f"ZeRO stage {stage}")
    processes = run.settings.get("processes")
    if isinstance(processes, int):
        words.append(
            f"{processes} process{'es' * (processes != 1)} on {run.settings.get('device', 'an unknown device')}"
        )
    shared_by = _mapping(config.get("tensor_parallel")).get("autotp_size")
    if isinstance(shared_by, int) and shared_by > 1:
        words.append(f"tensor-parallel size {shared_by}")
    lives = len(lives_of(run.settings))
    if lives > 1:
        words.append(f"started {lives} times")
    return " · ".join(str(word) for word in words if word)


def _name_of_model(run: Run) -> str:
    model = run.section("model")
    names = model.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else model.get("model_type")
    return name if isinstance(name, str) else ""


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and a small line below it, each HTML; the first is the result."""
    training, summary = run.history.training, run.summary
    result = run.perplexity
    label = "held-out perplexity" if run.state == "finished" else "held-out perplexity so far"
    unigram, test = finite(summary.get("perplexity_unigram")), finite(summary.get("perplexity_test"))
    small = f"unigram model {perplexity(unigram)}" if unigram else "of a sample" if run.is_of_a_sample else ""
    facts = [(label, "–" if result is None else perplexity(result), small)]
    if test is not None:
        facts.append(("test perplexity", perplexity(test), "text kept for the end"))
    steps = finite(summary.get("steps")) or (training.steps[-1] if len(training) else None)
    planned = _planned(run)
    if steps is not None:
        facts.append(("updates", f"{steps:,.0f}", f"of {planned:,}" if planned and planned > steps else ""))
    tokens = finite(summary.get("tokens")) or (float(training["tokens"][-1]) if len(training) else None)
    if tokens is not None:
        epochs = finite(summary.get("epochs")) or finite(_last(training["epoch"]))
        facts.append(("training tokens", short(tokens), f"{epochs:,.2f} epochs" if epochs else ""))
    speed = finite(summary.get("tokens_per_second")) or finite(_last(training["tokens_per_second"]))
    if speed:
        update = _measured_after(run)
        facts.append(("tokens per second", f"{speed:,.0f}", f"after update {update:,.0f}" if update else ""))
    flops, share = finite(summary.get("tflops_per_rank")), finite(summary.get("mfu"))
    if flops:
        facts.append(("TFLOP/s per rank", f"{flops:.3g}", f"{share:.1%} of the peak" if share else ""))
    parameters, trained = finite(summary.get("parameters")), finite(summary.get("trained_parameters"))
    if parameters:
        some = trained is not None and trained < parameters
        facts.append(("parameters", short(parameters), f"{short(trained or 0)} trained" if some else ""))
    peak = finite(summary.get("peak_memory_bytes")) or finite(_last(training["peak_memory_bytes"]))
    if peak:
        facts.append(("peak memory", human_bytes(peak), "of a process"))
    skipped = len(run.history.events.get("skipped", ()))
    if skipped:
        facts.append(("skipped updates", f"{skipped:,}", ""))
    return facts


def _measured_after(run: Run) -> float | None:
    """The update from which on speeds are measured: the last one before the run was resumed, if it was."""
    lives = lives_of(run.settings)
    return finite(run.summary.get("measured_after_update", lives[-1]["from_update"] if lives else None))


def _planned(run: Run) -> int | None:
    """How many updates the run was to make, if its settings say so."""
    schedule = _mapping(_mapping(run.section("deepspeed").get("scheduler")).get("params"))
    for found in (run.section("arguments").get("steps"), schedule.get("total_num_steps")):
        if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 1 << 60:
            return found
    return None


def _last(values: Any) -> float:
    return float(values[-1]) if len(values) else math.nan


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, dict) else {}


def _small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""
