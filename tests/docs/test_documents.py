"""The documents are held to the code and to each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.diagrams import all_diagrams
from tests.support.processes import ROOT

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def headings(text: str) -> set[str]:
    """Anchors of a document, as Markdown renderers make them."""
    titles = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_between_documents_leads_somewhere(document):
    for target in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (document.parent / name).resolve() if name else document
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in headings(there.read_text()), target


@pytest.mark.parametrize("name", sorted(all_diagrams()))
def test_the_diagrams_are_those_of_the_code(name):
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert f"<!-- {name} -->\n```mermaid\n{all_diagrams()[name]}\n```" in text


def test_every_path_of_the_code_that_a_document_names_exists():
    for document in DOCUMENTS:
        for path in re.findall(r"`((?:billing_worker|tests|docs)/[\w./-]+)`", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_every_room_of_the_map_exists_and_every_room_is_on_the_map():
    text = (ROOT / "docs" / "architecture.md").read_text()
    [block] = re.findall(r"```text\n(billing_worker/.*?)```", text, re.DOTALL)
    named = set(re.findall(r"^  ([a-z_]+)/", block, re.MULTILINE))
    inner = set(re.findall(r"^    ([a-z_]+)/", block, re.MULTILINE))
    package = ROOT / "billing_worker"
    assert named == {path.name for path in _rooms(package)}
    assert inner == {p.name for floor in _rooms(package) for p in _rooms(floor)} - {"migrations"}


def _rooms(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if (path / "__init__.py").exists()]


def test_the_glossary_is_sorted_and_says_each_word_once():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [row.strip() for row in rows if row.strip("- ") and row.strip() != "word"]
    assert words == sorted(words)
    assert len(words) == len(set(words))
