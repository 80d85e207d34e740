"""What documents point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("findings/*.md")])


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [file.name for file in (ROOT / "docs").glob("*.md") if f"({file.name})" not in index]
    assert missing == ["README.md"]


def test_every_test_that_a_document_names_is_there() -> None:
    defined = {
        name
        for file in ROOT.glob("tests/*/test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    defined |= {file.stem for file in ROOT.glob("tests/*/test_*.py")}
    for document in DOCUMENTS:
        named = set(re.findall(r"`(test_\w+)`", document.read_text()))
        assert named <= defined, f"{document.name}: {named - defined}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_file_of_the_code_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    named = set(re.findall(r"`((?:d2lora|tests|benchmarks|findings|hydra_plugins)/[\w./]+)`", text))
    examples = {f"d2lora/report/{name}.py" for name in re.findall(r"<!-- artefact: (\w+) -->", text)}
    missing = [path for path in named - examples if "NAME" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_what_a_document_quotes_is_in_the_file() -> None:
    quoted = [
        (file, code)
        for document in DOCUMENTS
        for file, code in re.findall(r"<!-- quoted: (\S+) -->\n```\w+\n(.*?)```", document.read_text(), re.S)
    ]
    assert quoted
    for file, code in quoted:
        assert code in (ROOT / file).read_text(), f"{file} is no longer as quoted:\n{code}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
