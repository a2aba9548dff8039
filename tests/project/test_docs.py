"""The documents and docstrings agree with the code: examples run, names and messages are there."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import bn_ext
import bn_ext.data
import bn_ext.graph
import bn_ext.nn
import bn_ext.train

ROOT = Path(__file__).parents[2]
PLACES = {
    "bn_ext": (bn_ext, bn_ext.__all__),
    "bn_ext.cuda": (bn_ext.cuda, bn_ext.cuda.__all__),
    "bn_ext.data": (bn_ext.data, bn_ext.data.__all__),
    "bn_ext.graph": (bn_ext.graph, bn_ext.graph.__all__),
    "bn_ext.nn": (bn_ext.nn, [name for name in bn_ext.nn.__all__ if name not in bn_ext.__all__]),
    "bn_ext.train": (bn_ext.train, bn_ext.train.__all__),
    "bn_ext.functional": (bn_ext.functional, ["batch_norm"]),
    "bn_ext.activation": (bn_ext.activation, ["NAMES", "DEFAULTS", "PARAMETERS", "check", "apply"]),
}
PUBLIC = {f"{place}.{name}": getattr(module, name) for place, (module, names) in PLACES.items() for name in names}
DOCUMENTED = {name: what for name, what in PUBLIC.items() if callable(what) or isinstance(what, ModuleType)}
CALLED = {name: what for name, what in DOCUMENTED.items() if callable(what)}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings(name: str) -> None:
    lines: list[str] = []
    names = {"bn_ext": bn_ext, "nn": nn, "torch": torch}
    test = doctest.DocTestParser().get_doctest(DOCUMENTED[name].__doc__, names, name, None, None)
    doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
    assert not lines, "".join(lines)


EXAMPLES = sorted([*ROOT.glob("docs/nn/*.md"), *ROOT.glob("docs/train/*.md")])


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_on_pages(page: Path) -> None:
    """Each page has an example of about ten lines, in blocks marked ``pycon``, that share their names."""
    example = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(example, {}, page.name, str(page), 0)
    assert test.examples
    lines: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
    assert not lines, "".join(lines)


@pytest.mark.parametrize("name", CALLED)
def test_sections_of_docstrings(name: str) -> None:
    function = CALLED[name]
    sections = re.findall(r"^ *(\w+):$", function.__doc__, re.MULTILINE)
    assert "Example" in sections
    assert "Raises" in sections or function is bn_ext.set_warn_fallback  # takes anything
    if inspect.signature(function).parameters:
        assert "Args" in sections
    if isinstance(function, type):
        assert "Shape" in sections
    else:
        assert "Returns" in sections or inspect.signature(function).return_annotation == "None"


def test_every_public_name_is_on_the_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in PUBLIC if not re.search(rf"`{re.escape(name)}\b", page)]
    assert not missing
    unknown = [name for name in re.findall(r"^#+ `([\w.]+)", page, re.MULTILINE) if name not in PUBLIC]
    assert unknown == []


# ------------------------------------------------------------------------------------------ messages


def literals_of_python(source: str) -> Iterator[str]:
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


def literals_of_cpp(source: str) -> Iterator[str]:
    joined = re.sub(r'"\s*\n\s*"', "", source)  # adjacent ones
    for literal in re.findall(r'"((?:[^"\\\n]|\\.)*)"', joined):
        yield re.sub(r"\\(.)", r"\1", literal)


def literals() -> str:
    """The texts in the sources of which messages are put together, each on a line."""
    texts: list[str] = []
    for path in [ROOT / "setup.py", *ROOT.glob("bn_ext/**/*.py")]:
        texts += literals_of_python(path.read_text())
    for path in [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h")]:
        texts += literals_of_cpp(path.read_text())
    return "\n".join(texts)


def messages(page: str) -> list[str]:
    """The messages of ours that a page quotes: in blocks marked ``text``, one a line, with ``<what varies>``."""
    blocks = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def unfound(message: str, source: str) -> list[str]:
    """The fixed parts of a message that no literal holds. One without a fixed part of some words is unfound itself."""
    parts = re.split(r"<[^>]*>|: | \(|\)", re.sub(r"^\w+(Error|Warning): ", "", message))
    if len("".join(parts)) < 10:
        return [message]
    return [part for part in parts if part not in source]


def test_quoted_messages_are_in_the_sources() -> None:
    quoted, source = messages((ROOT / "docs" / "troubleshooting.md").read_text()), literals()
    assert len(quoted) > 20
    assert {message: parts for message in quoted if (parts := unfound(message, source))} == {}


@pytest.mark.parametrize(
    ("message", "is_there"),
    [
        ("ImportError: bn_ext was built against torch <A>, this is torch <B>", True),
        ("ImportError: bn_ext was built against pytorch <A>, this is torch <B>", False),
        ("RuntimeError: <name> should contain <C> elements not <n>", True),
        ("RuntimeError: <name> should contain <C> values not <n>", False),
        ("<all> of <it>", False),
    ],
)
def test_a_wrong_quotation_is_found(message: str, is_there: bool) -> None:
    assert (not unfound(message, literals())) == is_there


# ------------------------------------------------------------------------------------------ links

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")]
TOPICS = [ROOT / f"docs/{name}.md" for name in ("architecture", "numerics", "glossary")]
GUIDES = [*TOPICS, *ROOT.glob("docs/howto/*.md"), *EXAMPLES, ROOT / "tests/simt/README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that a heading of a page has: its words in lower case, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def unknown_places(text: str) -> list[str]:
    """The files of the repository, and the tests in them, that a text names in backticks and that are not there."""
    folders = "bench|bn_ext|csrc|docs|examples|tests"
    named = re.findall(rf"`((?:{folders})/[\w./]*)(?:::(\w+))?`", text)
    return [
        f"{path}::{test}" if test else path
        for path, test in named
        if not (ROOT / path).exists() or (test and f"def {test}(" not in (ROOT / path).read_text())
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_documents(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_guides_name_files_that_are_there(page: Path) -> None:
    assert unknown_places(page.read_text()) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A Page\n[1](page.md) [2](#a-page) [3](page.md#a-page) [4](none.md) [5](#none) [6](page.md#none)")
    assert broken_links(page) == ["none.md", "#none", "page.md#none"]


def test_a_file_that_is_not_there_is_found() -> None:
    page = "tests/project/test_docs.py"
    here = f"`{page}` `{page}::test_links_between_documents` `csrc/core` `other/file.h`"
    assert unknown_places(here) == []
    gone = f"`csrc/core/none.h` `{page}::test_none`"
    assert unknown_places(gone) == ["csrc/core/none.h", f"{page}::test_none"]
