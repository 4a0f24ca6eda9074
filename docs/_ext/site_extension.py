"""Directives of this site, and what is done at its build: lists of pages, references to names, external links.

- ``{facts} GaLoreAdamW``: what a method trains and supports, and what it keeps.
- ``{settings} GaLoreAdamW``: the keys of a method or a section; ``{settings} rules`` and ``{settings}
  parametrizations``: those of all methods in one table.
- ``{measurements} paper_tiny``: rows of docs/benchmark.md, whose first cells are the directive's lines.
- ``{program-help} megalr pretrain, launchers/pretrain.py``: the help of the first of these programs that there is,
  if there is one.
- ``{page-cards}``: a grid of cards, a line for each: page | title | text. Pages that do not exist are left out.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import site_figures
import site_methods
import site_programs
import site_settings
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
ENTRY = re.compile(r"^([a-z_]+(?:/[a-z_*]+)?)$", re.MULTILINE)  # a page in a list of the front page
DROPPED = "\0"


class _Markdown(SphinxDirective):
    """A directive whose content is Markdown that is made at the build."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parse what :meth:`text` gives."""
        try:
            text = self.text()
        except (LookupError, ValueError) as error:
            raise self.error(str(error)) from error
        node = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), self.get_source_info()[0]), self.content_offset, node)
        return node.children

    def text(self) -> str:
        """The Markdown."""
        raise NotImplementedError


class Facts(_Markdown):
    """See the module."""

    def text(self) -> str:
        return site_methods.facts(self.arguments[0])


class Settings(_Markdown):
    """See the module."""

    def text(self) -> str:
        name = self.arguments[0]
        if name == "rules":
            names = [each for each, rule in site_settings.RULES.items() if rule is not None]
            return site_settings.shared_table({each: site_settings.place_of(each) for each in names})
        if name == "parametrizations":
            names = [each for each in site_settings.PARAMETRIZATIONS if each != "full"]
            return site_settings.shared_table({each: site_settings.place_of(each) for each in names})
        return site_settings.table(site_settings.place_of(name))


class Measurements(_Markdown):
    """See the module."""

    def text(self) -> str:
        return site_figures.quoted(self.arguments[0], [line.strip() for line in self.content if line.strip()])


class ProgramHelp(_Markdown):
    """See the module."""

    def text(self) -> str:
        names = [name.strip() for name in self.arguments[0].split(",")]
        program = next((name for name in names if name in site_programs.programs()), None)
        if program is None:
            return ""
        parsers = [site_programs.parser_of(program)]
        if program == "megalr pretrain" and (launch := site_programs.launch_parser()) is not None:
            parsers.append(launch)
        return "\n\n".join(map(site_programs.help_of, parsers))


class PageCards(_Markdown):
    """See the module."""

    required_arguments = 0

    def text(self) -> str:
        cards = []
        for line in self.content:
            page, title, text = (part.strip() for part in line.split("|"))
            if page in self.env.found_docs:
                cards.append(f":::{{grid-item-card}} {title}\n:link: {page}\n:link-type: doc\n{text}\n:::")
        return "::::{grid} 1 2 2 3\n:gutter: 2\n\n" + "\n\n".join(cards) + "\n::::"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register everything."""
    app.add_directive("facts", Facts)
    app.add_directive("settings", Settings)
    app.add_directive("measurements", Measurements)
    app.add_directive("program-help", ProgramHelp)
    app.add_directive("page-cards", PageCards)
    app.connect("source-read", _list_pages)
    app.connect("autodoc-process-signature", _short_signature)
    app.connect("missing-reference", _name_without_a_page)
    app.connect("build-finished", _list_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _list_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill the lists of the sidebar: the pages of methods, and of the front page's entries those that exist."""
    if page == "methods":
        entries = dict.fromkeys(path.removesuffix(".md") for path in site_methods.pages().values())
        source[0] += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(entries) + "\n```\n"
    if page == "index":
        found, listed = app.env.found_docs, set(ENTRY.findall(source[0]))

        def fill(entry: re.Match[str]) -> str:
            if entry[1].endswith("/*"):
                return "\n".join(sorted(p for p in found - listed if p.startswith(entry[1][:-1]))) or DROPPED
            return entry[1] if entry[1] in found else DROPPED

        blocks = [ENTRY.sub(fill, block).replace(f"{DROPPED}\n", "") for block in source[0].split("```{toctree}")]
        source[0] = "```{toctree}".join([source[0].split("```{toctree}")[0], *blocks[1:]])


def _short_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, annotation: str | None
) -> tuple[str | None, str | None]:
    """Write the default of a dataclass's list or dictionary as Sphinx can parse it."""
    return signature and signature.replace("<factory>", "..."), annotation


def _name_without_a_page(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """A name in a docstring that no page describes stands as code; the name has to exist all the same."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    for name in (
        target,
        f"{node.get('py:module')}.{target}",
        f"{node.get('py:module')}.{node.get('py:class')}.{target}",
    ):
        if _exists(name):
            return content
    return content if target.partition(".")[0] not in ("megalr", "torch") and _is_annotation(node) else None


def _is_annotation(node: pending_xref) -> bool:
    """Whether the reference is a type in a signature, which autodoc writes as the source does."""
    return node.get("reftype") in ("class", "obj", "data", "exc") and not node.get("refexplicit")


def _exists(name: str) -> bool:
    """Whether a dotted name can be imported, as a module or as an attribute of one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except (ImportError, ValueError):
            continue
        for part in parts[cut:]:
            annotated = part in getattr(found, "__annotations__", {})
            if not hasattr(found, part) and not annotated:
                return False
            found = getattr(found, part, None)
        return True
    return False


def _list_links(app: Sphinx, error: Exception | None) -> None:
    """Write the external links of all pages to links.txt, beside the pages."""
    if error is not None or app.builder.format != "html":
        return
    found: dict[str, set[str]] = {}
    for page in app.env.found_docs:
        for node in app.env.get_doctree(page).findall(nodes.reference):
            url = node.get("refuri", "")
            if url.startswith(("http://", "https://")):
                found.setdefault(url, set()).add(page)
    lines = [f"{url} {' '.join(sorted(pages))}" for url, pages in sorted(found.items())]
    Path(app.outdir, "links.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    logger.info("%d external links, listed in links.txt", len(lines))
