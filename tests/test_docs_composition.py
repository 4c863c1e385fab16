"""docs/composition.md and docs/routing.md say what is so: all of their Python runs, each line of the table too."""

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coadapt.cli.group import run as coadapt
from coadapt.cli.output import console
from coadapt.demo import BASE
from coadapt.demo.task import examples
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.training.usage import read_usage
from models import stir

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ("composition.md", "routing.md")
KNOWN = (
    "several active adapters", "mixed batch", "`add_weighted_adapter`", "`PeftMixedModel`", "X-LoRA", "Poly", "MHR",
    "Arrow", "Stack", "Fuse", "Split", "BatchSplit", "Parallel", "Average", "UniPELT", "MAM", "AdapterFusion", "MAD-X",
    "MoLE", "LoRA-Flow", "LoraHub", "ATTEMPT", '"prompt + LoRA"', "LLaMA-Adapter", "served",
)  # fmt: skip
"""Schemes that the table must have a line for."""


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def table() -> list[tuple[str, str]]:
    """(scheme, its line of Python)"""
    _, _, rows = text_of("composition.md").partition("| scheme | from | here | what differs |\n")
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows.splitlines()[1:] if row.startswith("|")]
    assert all(len(row) == 4 for row in cells)
    return [(row[0].strip(), row[2].strip().removeprefix("`").removesuffix("`")) for row in cells]


def run(code: str, names: dict[str, Any], file: str) -> Any:
    """Runs `code`; what its last line gives, if that is an expression."""
    *before, last = ast.parse(code).body
    exec(compile(ast.Module(before, []), file, "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), file, "eval"), names)
    exec(compile(ast.Module([last], []), file, "exec"), names)
    return None


def begun(page: str) -> dict[str, Any]:
    """What the first block of a page makes, with adapters that do something."""
    names: dict[str, Any] = {"__name__": page}
    run(blocks(page)[0], names, f"{page}, its first block")
    stir(names["model"].adapters, seed=0, by=0.3)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_its_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = begun(page)
    found = blocks(page)
    assert len(found) > 5
    for number, block in enumerate(found[1:], 2):
        run(block, names, f"{page}, block {number}")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    made = begun("composition.md")
    return {**made, "own": made["base"](**made["batch"]).logits}


@pytest.mark.parametrize(("scheme", "line"), table())
def test_each_line_of_the_table_runs(scheme: str, line: str, names: dict[str, Any]) -> None:
    """And does something: an adapter is made, or the output is another than the base's in every row that has one."""
    model, batch = names["model"], names["batch"]
    before = set(model.peft_config)
    out = run(line, names, scheme)
    if line.startswith(("model.combine", "model.add_weighted_adapter")):
        (new,) = set(model.peft_config) - before
        return differs(model(**batch, adapters=new).logits, names["own"])
    if line.startswith("best"):
        assert names["best"] in list(names["product"]((-0.5, 0, 0.5, 1), repeat=2))
        return differs(
            model(**batch, adapters=names["Sum"]("task", "style", weights=names["best"])).logits, names["own"]
        )
    if line.startswith("model.generate"):
        alone = [model.generate(**batch, adapters=name, max_new_tokens=4) for name in ("task", "style")]
        assert not torch.equal(alone[0], alone[1])
        assert torch.equal(out, torch.stack([alone[0][0], alone[1][1]]))
        return None
    if "backward" in line:
        assert all(p.grad.isfinite().all() for p in model.get_adapter("task").parameters())
        return None
    return differs((model(**batch) if out is None else out).logits, names["own"])


def differs(logits: Tensor, own: Tensor) -> None:
    """In the first row, and finite everywhere."""
    assert logits.isfinite().all()
    assert not torch.allclose(logits[0], own[0], atol=1e-4)


def test_a_run_may_have_a_router_and_show_draws_what_it_used(tmp_path: Path) -> None:
    rows = [json.dumps(row) + "\n" for row in examples("train", 24, 0)]
    (tmp_path / "rows.jsonl").write_text("".join(rows), "utf-8")
    run_config = RunConfig(
        model=str(BASE),
        data=str(tmp_path / "rows.jsonl"),
        adapters={"a": {"method": "lora", "r": 2}, "b": {"method": "lora", "r": 2}},  # type: ignore[arg-type]
        composition="token_router(a, b)",
        output_dir=str(tmp_path / "routed"),
        max_steps=2,
        use_cpu=True,
    )
    train(run_config, console())
    (used,) = read_usage(tmp_path / "routed")
    assert sum(used.overall().values()) == pytest.approx(1.0, abs=1e-4)
    assert coadapt(["show", str(tmp_path / "routed"), "--picture", str(tmp_path / "usage.png")]) == 0
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_known_scheme() -> None:
    schemes = " ".join(scheme for scheme, _ in table())
    assert [known for known in KNOWN if known not in schemes] == []


def test_its_pictures_are_there_and_can_be_drawn(tmp_path: Path) -> None:
    shown = {name for page in PAGES for name in re.findall(r"\]\(pictures/(\w+)\.png\)", text_of(page))}
    assert shown <= {file.stem for file in (DOCS / "pictures").iterdir()}
    runpy.run_path(str(ROOT / "tools" / "draw_compositions.py"))["main"](tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == shown - {"usage"}


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text_of(page)):
        assert (DOCS / link).exists(), link
