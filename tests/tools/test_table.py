"""Tables in text and in HTML."""

from __future__ import annotations

from bn_ext._table import Table

TABLE = Table(("layer", "runs on"), [("a.bn", "bn_ext"), ("head", "torch <1>")], ["2 batch norms"], ["one & all"])


def test_columns_are_aligned() -> None:
    assert str(TABLE).splitlines() == [
        "2 batch norms",
        "layer  runs on",
        "a.bn   bn_ext",
        "head   torch <1>",
        "one & all",
    ]


def test_without_rows_there_is_no_head() -> None:
    empty = Table(("layer",), [], ["no batch norms"])
    assert str(empty) == "no batch norms"
    assert "<table>" not in empty._repr_html_()


def test_html_is_escaped() -> None:
    html = TABLE._repr_html_()
    assert "<td>torch &lt;1&gt;</td>" in html and "one &amp; all" in html and "<th>layer</th>" in html
