"""The README says what is so: its Python runs as it stands, and its table is that of the methods there are."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_methods_are_those_that_there_are() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "methods_page.py"))
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert README == made["written"](README), "run python tools/methods_page.py"
    assert page == made["page"](page), "run python tools/methods_page.py"
    table = made["between"](page, made["TABLE"], made["TABLE_END"])
    for method in made["METHODS"].values():
        assert f"\n| {method.__name__} |" in table, "run python tools/methods_page.py --run"
        formula, paper, use, cost = made["parts"](method)
        assert all((formula, paper, use, cost)), f"{method.__name__}'s docstring lacks one of its parts"


@pytest.mark.full
def test_each_method_can_do_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    made = runpy.run_path(str(ROOT / "tools" / "methods_page.py"))
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert made["between"](page, made["TABLE"], made["TABLE_END"]).strip() == made["abilities_table"]().strip()


def test_its_first_block_of_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert sorted(p.name for p in (tmp_path / "my-adapters").iterdir() if p.is_dir()) == ["style", "task"]
    assert capsys.readouterr().out.startswith("The cat sleeps in the garden.")


def test_its_method_is_the_one_in_the_project() -> None:
    """The whole method that it shows, but for types and docstrings, is methods/bitfit.py."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "src" / "coadapt" / "methods" / "bitfit.py").read_text("utf-8")
    for line in (
        'kind = "BITFIT"',
        "self.delta = nn.Parameter(torch.zeros(layer.shape[0]))",
        "bias + self.delta",
        "return weight",
    ):
        assert line in block
        assert line in source
