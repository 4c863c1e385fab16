"""The README says what is so: its Python runs as it stands, and its table is that of the methods there are."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_table_of_methods_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    made = runpy.run_path(str(ROOT / "tools" / "methods_table.py"))
    assert README == made["written"](README), "run python tools/methods_table.py"


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
