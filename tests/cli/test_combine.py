"""coadapt combine: folders in, one adapter folder out, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from coadapt import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.cli.combine import WAYS
from coadapt.combining import WAYS as KNOWN
from models import ids, logits, stir

Call = Callable[..., tuple[int, str, str]]


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A folder with the adapters task and style, and prompts p and q."""
    view = get_peft_model(loaded(base), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), adapter_name="task")
    view.add_adapter("style", LoraConfig(r=2, target_modules="all-linear"))
    for name in "pq":
        view.add_adapter(name, PromptTuningConfig(num_virtual_tokens=2))
    stir(view.adapters)
    view.set_adapter("task + style")
    view.save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "provenance.json"
    file.write_text(json.dumps({"prompt": {"separator": "\n"}}))
    return tmp_path / "run"


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def expected(base: Path, run: Path, node: str) -> Tensor:
    return logits(PeftModel.from_pretrained(loaded(base), run), ids(), adapters=node)


def test_the_command_knows_every_way() -> None:
    assert tuple(KNOWN) == WAYS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_a_composition_folder_becomes_one_adapter(call: Call, base: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, said = call("combine", "--adapter", run, "task - 0.5*style", "--out", out)
    assert code == 0, said
    assert "exact" in text
    assert "14 sites, ranks 2 to 5, exact" in text
    assert "Nothing is lost at any site." in text
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "provenance.json"
    ]  # fmt: skip
    told = json.loads((out / "provenance.json").read_text())
    assert told["prompt"] == {"separator": "\n"}
    assert told["combined"]["composition"] == "task - 0.5*style"
    assert told["combined"]["exact"] is True
    true = expected(base, run, "task - 0.5*style")
    assert off(logits(PeftModel.from_pretrained(loaded(base), out), ids()), true) < 1e-5
    assert off(logits(peft.PeftModel.from_pretrained(loaded(base), out).eval(), ids()), true) < 1e-5
    code, _, said = call("generate", "--adapter", out, "--prompt", "3?", "--max-new-tokens", 2)
    assert code == 0, said


def test_several_folders_and_their_names(call: Call, base: Path, run: Path, tmp_path: Path) -> None:
    view = get_peft_model(loaded(base), IA3Config())
    stir(view.adapters)
    view.save_pretrained(tmp_path / "scales")
    out = tmp_path / "out"
    folders = ("--adapter", run / "task", "--adapter", f"s={tmp_path / 'scales'}")
    code, text, said = call("combine", *folders, "task + s", "--how", "svd", "--r", 5, "--out", out)
    assert code == 0, said
    assert "rank" in text
    assert "% from the sum" in text
    assert "model.layers.0.mlp.down_proj" in text
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    assert PeftModel.from_pretrained(loaded(base), out).peft_config["default"].peft_type == "LORA"
    code, text, said = call("combine", *folders, "task + s", "--how", "svd", "--r", "full", "--out", tmp_path / "full")
    assert code == 0, said
    assert "exact" in text


def test_prompts_too(call: Call, base: Path, run: Path, tmp_path: Path) -> None:
    code, text, said = call("combine", "--adapter", run, "p >> q", "--out", tmp_path / "out")
    assert code == 0, said
    assert "4 virtual tokens" in text
    found = logits(PeftModel.from_pretrained(loaded(base), tmp_path / "out"), ids())
    assert off(found, expected(base, run, "p >> q")) < 1e-5


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["task + nobody"], 1, "There is no adapter 'nobody'"),
        (["task + p"], 1, "One adapter cannot be all of these"),
        (["task", "--how", "svdd", "--r", 2], 1, "Did you mean 'svd'"),
        (["task", "--how", "ties", "--r", 2], 1, "needs density="),
        (["task", "--r", "many"], 2, "--r"),
        (["task", "--r", 2], 1, "r has no effect"),
        (["task", "--adapter", "nowhere"], 1, "There is no adapter folder 'nowhere'"),
        (["task", "--adapter", "x/run"], 2, "Two folders are called 'run'"),
    ],
)
def test_wrong_calls_write_nothing(
    args: list[Any], code: int, message: str, call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, said = call("combine", "--adapter", run, *args, "--out", tmp_path / "out")
    assert (found, message in said) == (code, True), said
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_there_is_kept(call: Call, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    code, _, said = call("combine", "--adapter", run, "task", "--out", out)
    assert code == 2
    assert "not empty" in said
    assert (out / "mine").read_text() == "x"


def test_a_write_that_fails_leaves_nothing(call: Call, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, said = call("combine", "--adapter", run, "p >> q", "--out", tmp_path / "file" / "out")
    assert (code, "Traceback" in said) == (1, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]
