"""README.md and docs/: what they link to, name and print is there."""

import contextlib
import io
import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text("utf-8") for page in PAGES}
TESTS = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("*.py"))


def anchors(text):
    """GitHub's names of the headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page.name]):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_tests_that_are_named_exist(name):
    for path in re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.py)\b", TEXTS[name]):
        places = [
            ROOT / folder / path for folder in (".", "lab", "variants", "experiments", "tests")
        ]
        assert path == "convert.py" or any(p.exists() for p in places), path
    for test in re.findall(r"\btest_\w+(?!\w*\.py)", TEXTS[name]):
        assert f"def {test}" in TESTS or (ROOT / "tests" / f"{test}.py").exists(), test


def test_the_readmes_example_prints_what_stands_below_it():
    code, printed = re.search(
        r"```python\n(import.*?)```\n\n```\n(.*?)```", TEXTS["README.md"], re.S
    ).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
