"""All rules and parametrizations as Markdown, from their docstrings: ``python -m megalr.methods > docs/methods.md``.

Each has a page of its own in docs/methods, which :func:`page_of` names.

A method's line is the first one of its module's docstring, ``Name: what it is, its papers.``; what a key means is said
under ``Attributes:`` in the docstring of the class that declares it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megalr.formatting import markdown_table
from megalr.layers.base import Parametrization
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.tensor_parallel.cutting import types_that_are_cut
from megalr.rules.base import Rule
from megalr.rules.registry import RULES, hyperparameters

PAPER = re.compile(r"arXiv (?P<arxiv>\d{4}\.\d{4,5})|openreview (?P<openreview>\w+)|(?P<page>https?://[^\s,]*[^\s,.])")
BETWEEN = re.compile(r"(?:,| and|\(| ICLR \d+)*\s*$")  # the end of a summary, before the first paper
RULES_COLUMNS = ("`type`", "method", "factors", "momentum reset", "lr", "paper")
PARAMETRIZATIONS_COLUMNS = (
    "`type`",
    "method",
    "rules",
    "refactorization",
    "momentum reset",
    "dense export",
    "tensor parallel",
    "paper",
)
HEAD = """# Methods

`python -m megalr.methods > docs/methods.md` writes this page from the docstrings in `megalr/rules` and `megalr/layers`.
Each method links to its own page, with its equations, state, settings and measurements.

On these pages W is an m x n weight and G its gradient. r is the rank, η the learning rate, λ the weight decay, ε Adam's
epsilon, and t the number of the update. Adam(R) is the direction of [Adam](methods/adamw.md) for the gradient R.

- A rule computes the update of a whole matrix from its gradient. Its state is what it keeps between updates, such as
  Adam's two moments.
- A parametrization stores the weight of a linear layer in another form, such as two thin factors B and A.
- A basis spans the subspace in which a rule works: P on the left, with R = Pᵀ G, or Q on the right, with R = G Q. A
  refresh computes a new basis. The gap is the number of updates between two refreshes of a matrix.
- Masters are the fp32 copies of the weights, which the optimizer updates.
"""
RULES_HEAD = """## Rules

`"optimizer": {"type": ..., "params": {...}}` chooses the rule for weight matrices. AdamW updates everything else.
Every rule works at every ZeRO stage and under tensor parallelism.

- factors: which factors the rule trains if a parametrization has factors. "matrices" excludes SLTrain, whose values are
  a vector.
- momentum reset: whether `"momentum_reset"` can reset the rule's moments. "`moments`": the rule's own key
  `"moments": "reset"` resets them at each refresh.
- lr: the default learning rate.
"""
PARAMETRIZATIONS_HEAD = """## Parametrizations

`"megalr": {"parametrization": {"type": ...}}` chooses how the weights of linear layers are represented.

- rules: whether rules that train factors can train the layers. AdamW always can.
- refactorization, momentum reset: whether these sections of the JSON apply.
- dense export: whether the layers can be exported as dense weights that compute the same function.
- tensor parallel: whether `megalr.initialize` splits the layers between ranks.
"""
OTHERS = """## Other techniques

You can combine these sections of "megalr" with many of the methods above:

- [`"refactorization"`](methods/refactorization.md) balances the factors of low-rank layers, SLTrain and LoRA.
- [`"momentum_reset"`](methods/momentum_reset.md) sets moments to zero at an interval.
- [`"activations"`](methods/velora.md) is VeLoRA, which saves compressed inputs of linear layers.
"""


def main() -> int:
    """Print the page."""
    print(page())
    return 0


def page() -> str:
    """The Markdown of docs/methods.md, without its last line break."""
    rules = {name: rule for name, rule in RULES.items() if rule is not None and _is_ours(rule)}
    kinds = {name: kind for name, kind in PARAMETRIZATIONS.items() if issubclass(kind, Parametrization)}
    layers = {name: kind for name, kind in kinds.items() if _is_ours(kind)}
    return "\n".join(
        [
            HEAD,
            RULES_HEAD,
            markdown_table(RULES_COLUMNS, _rule_lines(rules), numbers=False),
            "",
            _keys({name: (rule, hyperparameters(rule)) for name, rule in rules.items()}),
            "",
            PARAMETRIZATIONS_HEAD,
            markdown_table(PARAMETRIZATIONS_COLUMNS, _parametrization_lines(layers), numbers=False),
            "",
            _keys({name: (kind, _fields(kind)) for name, kind in layers.items()}),
            "",
            OTHERS.rstrip(),
        ]
    )


def _is_ours(method: type) -> bool:
    """Whether no plugin has brought it."""
    return method.__module__.partition(".")[0] == "megalr"


def summary(method: type) -> tuple[str, str]:
    """What a method is, in a line, and links to its papers.

    Raises:
        ValueError: its module's docstring does not begin with ``Name: what it is, its papers.``
    """
    line = (sys.modules[method.__module__].__doc__ or "").partition("\n")[0]
    papers = list(PAPER.finditer(line))
    if not papers or ": " not in line:
        raise ValueError(
            f'{method.__module__} begins with "{line}"; its docstring has to begin with "Name: what it is, arXiv ..."'
        )
    return BETWEEN.sub("", line[: papers[0].start()]), ", ".join(map(_link, papers))


def meanings(method: type) -> dict[str, str]:
    """What each key means, from the docstrings of a class and of those that it derives from."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        section = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\nAttributes:\n")[2]
        entry: list[str] = []
        for line in section.splitlines():
            if line and not line.startswith("    "):  # the section is over
                break
            if re.match(r"    \S", line):
                keys, _, text = line.strip().partition(": ")
                entry = keys.split(", ")
                found |= dict.fromkeys(entry, text)
            else:
                found |= {key: f"{found[key]} {line.strip()}".rstrip() for key in entry}
    return found


def page_of(name: str, method: type | None) -> str:
    """The path of a method's page, relative to docs: methods/galore.md.

    Args:
        name: the JSON's "type".
        method: its class; None for AdamW.
    """
    own = method.name if method is not None and issubclass(method, Rule) else name.lower()
    return f"methods/{own}.md"


def _rule_lines(rules: Mapping[str, type[Rule]]) -> list[list[str]]:
    lines = [
        [
            "[`AdamW`](methods/adamw.md)",
            "AdamW: Adam with decoupled weight decay",
            "all",
            "yes",
            "0.001",
            _arxiv("1711.05101"),
        ]
    ]
    for name, rule in rules.items():
        text, papers = summary(rule)
        factors = "no" if rule.not_for_factors else "all" if rule.takes_vectors else "matrices"
        reset = "yes" if rule.reset_keys else "`moments`" if "moments" in hyperparameters(rule) else "no"
        lines.append([f"[`{name}`]({page_of(name, rule)})", text, factors, reset, _text(rule.default_lr), papers])
    return lines


def _parametrization_lines(layers: Mapping[str, type[Parametrization]]) -> list[list[str]]:
    lines = [["[`full`](methods/full.md)", "Dense weights: the model as it is", "yes", "no", "yes", "yes", "yes"]]
    cut = types_that_are_cut()
    for name, kind in layers.items():
        text, papers = summary(kind)
        refused = [kind.not_by_rule, kind.not_refactorized, kind.not_reset, kind.not_dense, name not in cut]
        lines.append(
            [f"[`{name}`]({page_of(name, kind)})", text, *("no" if reason else "yes" for reason in refused), papers]
        )
    return lines


def _keys(methods: Mapping[str, tuple[type, Sequence[str]]]) -> str:
    """A table of the methods' keys; one line for all that say the same of a key, with the defaults that differ."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, (method, keys) in methods.items():
        said, defaults = meanings(method), _defaults(method)
        for key in keys:
            if key not in said:
                raise ValueError(f'{method.__name__} does not say under "Attributes:" what its key "{key}" means')
            found.setdefault((key, said[key]), {})[name] = defaults[key]
    lines = []
    for (key, text), of in sorted(found.items(), key=lambda line: (-len(line[1]), line[0])):
        usual = Counter(of.values()).most_common(1)[0][0]
        others = [f"`{name}`: {default}" for name, default in of.items() if default != usual]
        whose = "all" if len(of) == len(methods) else ", ".join(f"`{name}`" for name in of)
        lines.append([f"`{key}`", plain(text), "; ".join([usual, *others]), whose])
    return markdown_table(("key", "meaning", "default (others)", "used by"), lines, numbers=False)


def _fields(kind: type[Parametrization]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.name != "type"]


def _defaults(method: type) -> dict[str, str]:
    """The default of each key, and behind it the other values where these are few."""
    hints, found = typing.get_type_hints(method), {}
    for field in dataclasses.fields(method):
        hint = hints[field.name]
        options = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        others = ", ".join(_text(option) for option in options if option != field.default)
        default = "required" if field.default is dataclasses.MISSING else _text(field.default)
        found[field.name] = f"{default} ({others})" if others else default
    return found


def _text(value: Any) -> str:
    """A value as a reader of the JSON knows it."""
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def plain(text: str) -> str:
    """Docstring markup as Markdown, with values as JSON has them."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    text = text.replace("``", "`").replace("|", "\\|")
    return re.sub(r"\b(None|True|False)\b", lambda word: f"`{_text(ast.literal_eval(word[0]))}`", text)


def _link(paper: re.Match[str]) -> str:
    if paper["arxiv"]:
        return _arxiv(paper["arxiv"])
    if paper["openreview"]:
        return f"[openreview](https://openreview.net/forum?id={paper['openreview']})"
    return f"[page]({paper['page']})"


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


if __name__ == "__main__":
    sys.exit(main())
