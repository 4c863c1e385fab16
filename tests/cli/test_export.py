"""coadapt export: what is said, what is written, and that nothing is written in vain."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import killing
from coadapt import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.cli.export import TARGETS
from coadapt.demo import BASE
from coadapt.exporting import TARGETS as KNOWN
from models import ids, logits, stir

Call = Callable[..., tuple[int, str, str]]


def loaded(base: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A composition of two LoRAs, a prompt and scales beside it, on the demo's model."""
    view = get_peft_model(loaded(BASE), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), adapter_name="task")
    view.add_adapter("style", LoraConfig(r=2, target_modules="all-linear", use_rslora=True))
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    view.add_adapter("scales", IA3Config())
    stir(view.adapters)
    view.set_adapter("task + 0.5*style")
    view.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"prompt": {"separator": "\n"}}))
    return tmp_path / "run"


def test_the_command_knows_every_target() -> None:
    assert tuple(KNOWN) == TARGETS


def test_an_adapter_for_vllm(call: Call, run: Path, tmp_path: Path) -> None:
    code, text, said = call("export", run, "--for", "vLLM", "--use-cpu")
    assert code == 0, said
    assert "One LoRA of rank 5 at 28 layers, exact." in text
    assert "the likeliest answer is the same at 96 of 96 places" in text
    out = tmp_path / "run-vllm"
    assert f"vllm serve {BASE} --enable-lora --lora-modules adapter={out} --max-lora-rank 8" in text
    assert {p.name for p in out.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "export.json", "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip
    meant = logits(PeftModel.from_pretrained(loaded(BASE), run), ids())
    assert float((logits(PeftModel.from_pretrained(loaded(BASE), out), ids()) - meant).detach().abs().max()) < 1e-4
    assert json.loads((out / "provenance.json").read_text())["prompt"] == {"separator": "\n"}
    code, text, said = call("generate", "--adapter", out, "--prompt", "The cat", "--max-new-tokens", 2, "--use-cpu")
    assert code == 0, said


def test_what_is_lost_is_shown_site_by_site_and_told_to_machines(call: Call, run: Path, tmp_path: Path) -> None:
    options = ("--adapters", "task + scales", "--r", 4, "--use-cpu", "--out", tmp_path / "out")
    code, text, said = call("export", run, "--for", "mlx", *options)
    assert code == 0, said
    assert "the nearest to the change of each weight;" in text
    assert "from the sum" in text
    code, text, said = call("export", run, "--for", "mlx", *options, "--overwrite", "--json")
    assert code == 0, said
    told = json.loads(text)
    assert (told["target"], told["merged"], told["composition"]) == ("mlx", False, "task + scales")
    assert 0 < told["lora"]["lost"] < 1
    assert told["drift"]["places"] == 96
    assert told["files"]["adapters.safetensors"] == (tmp_path / "out" / "adapters.safetensors").stat().st_size
    recorded = json.loads((tmp_path / "out" / "export.json").read_text())
    assert recorded["lora"] == told["lora"]


def test_a_merged_model_is_a_plain_folder(call: Call, run: Path, tmp_path: Path) -> None:
    code, _, said = call("export", run, "--for", "hf", "--merged", "--out", tmp_path / "out", "--use-cpu")
    assert code == 0, said
    meant = logits(PeftModel.from_pretrained(loaded(BASE), run), ids())
    assert float((logits(loaded(tmp_path / "out"), ids()) - meant).detach().abs().max()) < 1e-4
    code, _, said = call("generate", "--model", tmp_path / "out", "--prompt", "The cat", "--max-new-tokens", 2)
    assert code == 0, said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--for", "vlm"], "Did you mean 'vllm'"),
        ([], "Missing option '--for'"),
        (["--for", "vllm", "--adapters", "task + nobody"], "There is no adapter 'nobody'"),
        (["--for", "vllm", "--adapters", "task + prompt"], "'prompt' is virtual tokens (PromptTuning)"),
        (["--for", "onnx", "--adapters", "prompt"], "cannot be merged into weights"),
        (["--for", "peft", "--merged"], "peft takes adapters only"),
        (["--for", "vllm", "--quantise", "int8"], "has no meaning here"),
        (["--for", "vllm", "--r", "0"], "r=0"),
        (["--for", "vllm", "--out", "run"], "is there already and not empty"),
        (["--for", "vllm", "--out", "run", "--overwrite"], "nothing that export wrote"),
        (["--for", "vllm", "--model", "run"], "model='run' is no folder with a model"),
    ],
)
def test_wrong_calls_write_nothing(
    args: list[str], message: str, call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, said = call("export", "run", *args)
    assert (code, text, message in said) == (2, "", True), said
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (run / "composition.json").is_file()


def test_a_missing_package_is_named(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coadapt.versions.found", lambda name: None)
    for target, package in (("llamacpp", "gguf"), ("onnx", "onnx onnxscript onnxruntime")):
        code, _, said = call("export", run, "--for", target)
        assert (code, f"Run: pip install {package}" in said) == (2, True), said
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_is_replaced_only_when_asked(call: Call, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("export", run, "--for", "mlx", "--out", out, "--use-cpu")[0] == 0
    first = (out / "adapters.safetensors").read_bytes()
    code, _, said = call("export", run, "--for", "vllm", "--out", out, "--use-cpu")
    assert (code, "--overwrite" in said) == (2, True)
    assert (out / "adapters.safetensors").read_bytes() == first
    assert call("export", run, "--for", "vllm", "--out", out, "--use-cpu", "--overwrite")[0] == 0
    assert not (out / "adapters.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_write_that_fails_leaves_nothing(call: Call, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, said = call("export", run, "--for", "mlx", "--out", tmp_path / "file" / "out", "--use-cpu")
    assert (code, "Traceback" in said) == (1, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def kill(run: Path, out: Path, kills: int, chance: random.Random) -> None:
    """A process that is killed leaves no folder, or a whole one, and the one that it was to replace is not lost."""
    whole: set[str] = set()
    for number in range(kills):
        args = ("export", str(run), "--for", "llamacpp", "--out", str(out), "--use-cpu", "--overwrite")
        process = killing.start(killing.command, out.with_name("log"), *args)
        end = time.monotonic() + 60
        while not out.with_name(f".coadapt-writing.{out.name}").exists() and process.exitcode is None:
            assert time.monotonic() < end
        time.sleep(chance.uniform(0, 0.3))
        if number:
            process.kill()
        process.join()
        assert process.exitcode in (0, -9), out.with_name("log").read_text()
        old = out.with_name(f".coadapt-replaced.{out.name}")
        there = out if out.exists() else old
        found = {p.name for p in there.iterdir()}
        whole = whole or found
        assert found == whole == {"adapter.gguf", "export.json"}
    process = killing.start(killing.command, out.with_name("log"), *args)
    process.join()
    assert process.exitcode == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["log", "out", "run"]


@pytest.mark.full
def test_a_process_that_is_killed_leaves_a_whole_folder(run: Path, tmp_path: Path) -> None:
    kill(run, tmp_path / "out", 40, random.Random(1))


def test_help_needs_no_torch(call: Call) -> None:
    code, text, _ = call("export", "--help")
    assert code == 0
    assert "--quantise" in text
