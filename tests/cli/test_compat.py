"""`coadapt compat`: what is on the screen, and what a machine reads."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from coadapt import LoraConfig, PeftModel, PromptTuningConfig

from .conftest import Call


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "two"
    view = PeftModel(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=32, task_type="CAUSAL_LM"), "style")
    view.add_adapter("task", PromptTuningConfig(num_virtual_tokens=2))
    view.set_adapter("style + task")
    view.save_pretrained(out)
    return out


def test_each_adapter_has_its_answers_and_the_command_that_mends_a_no(call: Call, folder: Path, base: Path) -> None:
    code, text, _ = call("compat", folder)
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "style: lora of rank 32"
    assert f'  peft          yes  peft.PeftModel.from_pretrained(base, "{folder}/style")' in lines
    no = lines.index("  vLLM          no   rank 32 is over its --max-lora-rank, 16 if nothing is said (at most 512)")
    mended = f"vllm serve {base} --enable-lora --lora-modules style={folder}/style --max-lora-rank 32"
    assert lines[no + 1] == f"                     → {mended}"
    assert "task: prompt-tuning" in lines
    assert "Together, as style + task, only coadapt loads them." in lines


def test_json_says_the_same(call: Call, folder: Path, base: Path) -> None:
    code, text, _ = call("compat", folder, "--json")
    found = json.loads(text)
    assert (code, found["base"]) == (0, str(base))
    assert {name: one["method"] for name, one in found["adapters"].items()} == {
        "style": "LORA",
        "task": "PROMPT_TUNING",
    }
    programs = found["adapters"]["style"]["programs"]
    assert {name for name, said in programs.items() if not said["loads"]} == {"vLLM", "MLX"}
    assert programs["MLX"]["command"] == f"coadapt export {folder}/style --for mlx"
    assert all(
        said["command"] is None for name, said in found["adapters"]["task"]["programs"].items() if name != "peft"
    )


def test_lines_but_commands_fit_80_columns(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = call("compat", folder)
    assert all(len(line) <= 80 for line in text.splitlines() if str(folder) not in line and "Together" not in line)


def test_what_is_no_adapter_is_refused(call: Call, base: Path, tmp_path: Path) -> None:
    for given, said in ((tmp_path / "no", "There is no folder"), (base, "holds a model, and no adapter")):
        code, text, error = call("compat", given)
        assert (code, text) == (2, "")
        assert error.startswith("error: ")
        assert said in error


def test_a_base_that_is_not_here_is_told(call: Call, folder: Path) -> None:
    code, _, error = call("compat", folder, "--model", "nowhere/at-all")
    assert (code, error) == (
        2,
        "error: --model 'nowhere/at-all' is no folder with a model, nor a model that was downloaded.\n",
    )
