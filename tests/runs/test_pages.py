"""What the pages look like as text: links, width, length. What they say to type is in test_documents."""

from __future__ import annotations

import re

from tests.support.launch import ROOT
from tests.support.pages import PAGES


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page} links to {target}, which is not there"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
                slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{page} links to #{anchor} of {target or page}, which is not there"


def test_pages_are_wrapped() -> None:
    for page in PAGES:
        generated = code = False
        for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
            code ^= line.lstrip().startswith("```")
            if line.startswith("<!--"):
                generated = "<!-- end" not in line
            if not code and not generated and not line.startswith(("|", "![", "<")):
                assert len(line) <= 120, f"{page}:{number} has {len(line)} characters"


def test_readme_names_no_version() -> None:
    """It said 0.1 when the program had long been another."""
    assert not re.search(r"[Vv]ersion \d", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
