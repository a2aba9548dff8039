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
import bn_ext.graph

ROOT = Path(__file__).parents[1]
PLACES = {
    "bn_ext": (bn_ext, bn_ext.__all__),
    "bn_ext.graph": (bn_ext.graph, bn_ext.graph.__all__),
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


def test_links_between_documents() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
