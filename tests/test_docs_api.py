"""The reference of Python has a place for every public name, and says of configurations what their sources say."""

import re
import runpy
from pathlib import Path

import coadapt

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"


def test_every_public_name_has_a_place() -> None:
    text = "\n".join(file.read_text("utf-8") for file in API.glob("*.md"))
    assert [name for name in coadapt.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_the_page_of_configurations_is_what_their_sources_say() -> None:
    """`python tools/configs_page.py` writes it anew."""
    made = runpy.run_path(str(ROOT / "tools" / "configs_page.py"))
    assert (API / "configs.md").read_text("utf-8") == made["page"]()
