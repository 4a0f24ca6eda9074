"""What all ranks have to have in common before they train a model together; see :mod:`megalr.agreement`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from megalr.agreement import code_facts, digest_of_files, json_facts
from megalr.hosts import logical_shape
from megalr.hosts.deepspeed_pipeline import has_stages
from megalr.hosts.tensor_parallel import AUTOTP, is_marked
from megalr.naming import named_parameters
from megalr.schema import Json


def facts_of(model: nn.Module, content: Json) -> dict[str, str]:
    """Code, configuration and model of this rank, by names for the user.

    The values of weights are not among them: DeepSpeed gives all ranks those of the first.

    Args:
        model: of any kind; pipeline stages have parameters of their own, which are left out.
        content: the DeepSpeed JSON, which may be wrong.
    """
    facts = {**code_facts(), **json_facts(content)}
    section = content.get("megalr")
    for name in section.get("plugins", ()) if isinstance(section, Mapping) else ():
        file = _file_of(str(name))
        facts[f"the plugin {Path(str(name)).name}"] = digest_of_files([file]) if file.is_file() else "not there"
    if not has_stages(model):
        facts |= {f"the parameter {name}": _in_words(parameter) for name, parameter in named_parameters(model)}
    return facts


def _file_of(plugin: str) -> Path:
    """A plugin's source, which is not imported for it."""
    if plugin.endswith(".py"):
        return Path(plugin).expanduser()
    try:
        spec = importlib.util.find_spec(plugin)
    except (ImportError, ValueError):  # its import will say so
        spec = None
    return Path((spec.origin if spec is not None else None) or "")


def _in_words(parameter: Tensor) -> str:
    trained = "trained" if parameter.requires_grad else "frozen"
    if is_marked(parameter) or hasattr(parameter, AUTOTP):
        return f"cut between tensor-parallel ranks, {trained}"  # in parts that need not be alike
    return f"{logical_shape(parameter)} {str(parameter.dtype).removeprefix('torch.')}, {trained}"
