"""What is left of a run at its end: a table, ``summary.json`` and the loss curve."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from megalr.formatting import human_bytes, summary_table
from megalr.memory.formulas import expected_bytes, measured_bytes
from megalr.memory.peak import peak_memory_bytes
from megalr.train.console import Screen
from megalr.train.evaluation import Evaluation
from megalr.train.loop import Loop
from megalr.train.loss_curve import plot_losses
from megalr.train.preparation import Plan
from megalr.train.ranks import Ranks
from megalr.train.run_folder import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baselines:
    """Held-out perplexities that a trained model has to be far below.

    Attributes:
        untrained: of the model before its first update; None where a resumed run has no record of it.
        unigram: of the training text's token frequencies.
    """

    untrained: float | None
    unigram: float


def finish(
    loop: Loop,
    plan: Plan,
    baselines: Baselines,
    export_difference: float | None,
    test: Evaluation | None,
    ranks: Ranks,
    screen: Screen,
) -> None:
    """Print the table and write the run's last files. Collective.

    Args:
        loop: after its last step.
        plan: what the run was.
        baselines: to be shown beside the model's perplexity.
        export_difference: largest logit difference of the exported model; None where nothing was exported.
        test: of the text that was kept for the end, if one was.
        ranks, screen: this process, where to print.
    """
    peak = max(ranks.gather(peak_memory_bytes()))
    # Gradients are gone by now, and at stage 3 the evaluation has left all weights gathered: what a step holds of these
    # two is computed. Tests hold the formula equal to live engines.
    expected, measured = expected_bytes(loop.engine), measured_bytes(loop.engine)
    held = {**asdict(measured), "weights": expected.weights, "gradients": expected.gradients}
    evaluation = loop.last_evaluation
    assert evaluation is not None  # the loop ends with one
    numbers: dict[str, Any] = {
        "perplexity": evaluation.perplexity,
        "perplexity_galore_compatible": evaluation.galore_compatible,
        "perplexity_test": None if test is None else test.perplexity,
        "perplexity_test_galore_compatible": None if test is None else test.galore_compatible,
        "perplexity_untrained": baselines.untrained,
        "perplexity_unigram": baselines.unigram,
        "loss": evaluation.loss,
        "eval_tokens": evaluation.tokens,
        "test_tokens": None if test is None else test.tokens,
        "steps": loop.step,
        "tokens": loop.tokens,
        "epochs": loop.epoch,
        "measured_after_update": loop.began_at,
        "tokens_per_second": loop.meter.tokens_per_second,
        **loop.meter.summary(),
        "parameters": loop.parameters,
        "trained_parameters": loop.trained_parameters,
        "processes": ranks.world_size,
        "bytes_per_rank": held,
        "peak_memory_bytes": peak,
        "export_logit_difference": export_difference,
    }
    ranks.from_first(lambda: write_summary(numbers, plan))
    screen.say(_table(numbers, plan, ranks))


def write_summary(numbers: dict[str, Any], plan: Plan) -> None:
    """Write ``summary.json`` and the loss curve, without which a run is complete."""
    title = f"{plan.folder.path.name}: held-out perplexity {numbers['perplexity']:,.2f}"
    write_json(plan.folder.summary, numbers)
    try:
        plot_losses(plan.folder.metrics, plan.folder.plot, title)
    except OSError as error:
        logger.warning("%s cannot be written: %s. The run is complete without it.", plan.folder.plot, error.strerror)


def _table(numbers: dict[str, Any], plan: Plan, ranks: Ranks) -> str:
    held = numbers["bytes_per_rank"]
    rows: list[tuple[str, object] | None] = [("held-out perplexity", f"{numbers['perplexity']:,.2f}")]
    if plan.arguments.galore_compatible_eval:
        rows.append(("  as published code computes it", f"{numbers['perplexity_galore_compatible']:,.2f}"))
    if numbers["perplexity_test"] is not None:
        rows.append(("test perplexity", f"{numbers['perplexity_test']:,.2f}"))
    if numbers["perplexity_untrained"] is not None:
        rows.append(("  of the untrained model", f"{numbers['perplexity_untrained']:,.2f}"))
    rows += [
        ("  of a unigram model", f"{numbers['perplexity_unigram']:,.2f}"),
        None,
        ("training tokens", numbers["tokens"]),
        ("  epochs of the text", f"{numbers['epochs']:,.2f}"),
        (f"tokens per second{_since(numbers)}", f"{numbers['tokens_per_second']:,.0f}"),
        *_speeds(numbers, "TFLOP/s per rank" if ranks.world_size > 1 else "TFLOP/s"),
        ("parameters", numbers["parameters"]),
        *([("  trained", trained)] if (trained := numbers["trained_parameters"]) < numbers["parameters"] else []),
        None,
        ("bytes per rank" if ranks.world_size > 1 else "bytes", human_bytes(sum(held.values()))),
        ("  weights", human_bytes(held["weights"])),
        ("  gradients", human_bytes(held["gradients"])),
        ("  fp32 masters", human_bytes(held["masters"])),
        ("  optimizer state", human_bytes(held["optimizer_state"])),
        ("peak memory of a process", human_bytes(numbers["peak_memory_bytes"])),
    ]
    if numbers["export_logit_difference"] is not None:
        rows += [None, ("exported to", plan.arguments.export)]
        rows.append(("  largest logit difference", f"{numbers['export_logit_difference']:.1e}"))
    rows += [None, ("everything is in", str(plan.folder.path))]
    return summary_table(rows)


def _since(numbers: dict[str, Any]) -> str:
    """What a speed is of, where it is not of the whole run."""
    update = numbers["measured_after_update"]
    return f" after update {update:,}" if update else ""


def _speeds(numbers: dict[str, Any], name: str) -> list[tuple[str, object]]:
    """Of what is known."""
    rows: list[tuple[str, object]] = []
    if numbers["tflops_per_rank"] is not None:
        rows.append((f"  {name}", f"{numbers['tflops_per_rank']:,.4g}"))
    if numbers["mfu"] is not None:
        rows.append(("  MFU", f"{100 * numbers['mfu']:.1f} %"))
    return rows
