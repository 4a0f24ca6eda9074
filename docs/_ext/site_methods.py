"""Facts of methods as Markdown: what each trains and supports, and what it keeps for one matrix."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from megalr.formatting import human_bytes, markdown_table
from megalr.layers.base import Parametrization
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.tensor_parallel.cutting import types_that_are_cut
from megalr.methods import page_of, summary
from megalr.rules.base import Rule
from megalr.rules.registry import RULES, hyperparameters

SHAPES = ((512, 512), (1376, 512))  # of the attention and the feed-forward matrices of the 60M model
FACTORS = {
    "no": "dense matrices",
    "matrices": "dense matrices, and matrices of factors",
    "all": "dense matrices, factors",
}
OTHERS = ("refactorization", "momentum_reset", "velora")  # pages of techniques that are no rule and no parametrization


def pages() -> dict[str, str]:
    """The path of each method's page, relative to docs, by the JSON's "type"."""
    kinds = {name: kind for name, kind in PARAMETRIZATIONS.items() if _is_ours(kind)}
    rules = {name: rule for name, rule in RULES.items() if rule is None or _is_ours(rule)}
    found = {name: page_of(name, method) for name, method in {**rules, **kinds}.items()}
    return found | {name: f"methods/{name}.md" for name in OTHERS}


def facts(name: str) -> str:
    """The facts of a rule or a parametrization.

    Args:
        name: the JSON's "type".
    """
    if name in RULES:
        rule = RULES[name]
        assert rule is not None, "AdamW is the optimizer's own"
        return f"{_facts_of_rule(name, rule)}\n\n{_state(name, rule)}"
    kind = PARAMETRIZATIONS[name]
    assert issubclass(kind, Parametrization), "dense weights have no facts"
    return f"{_facts_of_parametrization(name, kind)}\n\n{_sizes(name, kind)}"


def _facts_of_rule(name: str, rule: type[Rule]) -> str:
    trained = "no" if rule.not_for_factors else "all" if rule.takes_vectors else "matrices"
    defaults = f"{rule.default_lr:g}, {rule.default_eps:g}".replace("e-0", "e-")
    refresh = 'with `"moments": "reset"`, at each refresh' if "moments" in hyperparameters(rule) else "no"
    rows = [
        ["In the JSON", f'`"optimizer": {{"type": "{name}"}}`'],
        ["Trains", FACTORS[trained]],
        ["Momentum reset", 'with [`"momentum_reset"`](momentum_reset.md)' if rule.reset_keys else refresh],
        ["Default `lr`, `eps`; AdamW on the rest has them too", defaults],
        ["ZeRO", "stages 0 to 3"],
        ["Tensor parallelism", "yes"],
        ["Source", summary(rule)[1]],
    ]
    return markdown_table(("", ""), rows, numbers=False)


def _state(name: str, rule: type[Rule]) -> str:
    needed = [field.name for field in dataclasses.fields(rule) if field.default is dataclasses.MISSING]
    made = rule(**dict.fromkeys(needed, 1))
    rows = [
        [f"{m} x {n}", human_bytes(made.state_bytes((m, n))), human_bytes(8 * m * n)] for m, n in SHAPES
    ]  # AdamW keeps two fp32 moments
    columns = ("matrix", f"state of `{name}` at its defaults", "state of AdamW")
    return markdown_table(columns, rows)


def _facts_of_parametrization(name: str, kind: type[Parametrization]) -> str:
    rows = [
        ["In the JSON", f'`"megalr": {{"parametrization": {{"type": "{name}"}}}}`'],
        [
            "Trained by",
            f"AdamW alone: {kind.not_by_rule}" if kind.not_by_rule else "AdamW, and rules that train factors",
        ],
        ["Refactorization", f"no: {kind.not_refactorized}" if kind.not_refactorized else "[yes](refactorization.md)"],
        ["Momentum reset", _reset(kind)],
        ["Export to dense weights", f"no: {kind.not_dense}" if kind.not_dense else "yes"],
        ["ZeRO", "stages 0 to 3"],
        ["Tensor parallelism", "yes" if name in types_that_are_cut() else "no"],
        ["Source", summary(kind)[1]],
    ]
    return markdown_table(("", ""), rows, numbers=False)


def _reset(kind: type[Parametrization]) -> str:
    return f"no: {kind.not_reset}" if kind.not_reset else "[yes](momentum_reset.md)"


def _sizes(name: str, kind: type[Parametrization]) -> str:
    rows = []
    for m, n in SHAPES:
        layer = kind().replace(nn.Linear(n, m, bias=False), seed=0, name="layer")
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in layer.parameters() if not p.requires_grad)
        indices = sum(b.numel() * b.element_size() for b in layer.buffers() if b.dtype == torch.int32)
        rows.append([f"{m} x {n}", f"{trained:,}", f"{frozen:,}", human_bytes(indices) if indices else "0 B"])
        rows[-1] += [human_bytes(8 * trained), f"{m * n:,}"]
    columns = (
        "layer",
        "trained elements, r = 128",
        "frozen elements",
        "indices",
        "AdamW's moments",
        "elements of the dense weight",
    )
    if all(row[3] == "0 B" for row in rows):
        columns, rows = (*columns[:3], *columns[4:]), [[*row[:3], *row[4:]] for row in rows]
    return markdown_table(columns, rows)


def _is_ours(method: type) -> bool:
    return method.__module__.partition(".")[0] == "megalr"
