"""`coadapt serve` before it serves: what is wrong is said at once; and what is handed to vLLM."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.config import PeftConfig
from models import stir

Call = Callable[..., tuple[int, str, str]]


def saved(base: Path, folder: Path, config: PeftConfig, **more: PeftConfig) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    view = get_peft_model(model, config)
    for name, other in more.items():
        view.add_adapter(name, other)
    if more:
        view.set_adapter(["default", *more])
    stir(view.adapters)
    view.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return saved(base, tmp_path / "lora", LoraConfig(r=4))


def test_wrong_input_is_one_error(call: Call, base: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        (): "nothing to serve",
        (tmp_path / "no",): "There is no folder",
        (tmp_path / "empty",): "holds no adapter",
        ("--adapter", "a b=x"): "is no name for an adapter",
        ("--adapter", f"x={lora}", "--adapter", f"x={lora}"): "'x' is there twice",
        ("--model", base, "--adapters-dir", tmp_path / "no"): "There is no folder --adapters-dir",
        ("--model", base, "--adapters-dir", tmp_path, "--adapter", lora): "'lora' is there twice",
        ("--model", base, "--adapter", f"{base.name}={lora}"): "--name NAME",
        ("--model", base, "--host", "0.0.0.0"): "--api-key KEY",
        ("--model", base, "--host", "no.such.host.example"): "no such address",
        ("--model", base, "--api-key", ""): "--api-key must be",
        ("--model", base, "--rows", 0): "0 is not in the range",
        ("--model", base, "--tokens", 1): "tokens >= 2",
    }
    for args, said in cases.items():
        port = () if "--port" in args else ("--port", 0)
        code, out, err = call("serve", *args, *port)
        assert (code, out) == (2, "") and said in err, (args, err)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(call: Call, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, _, err = call("serve", "--model", tmp_path / "no model", "--port", other.getsockname()[1])
    assert code == 2 and "--port 0 takes a free one" in err
    assert err.count("\n") == 1


def test_an_adapter_that_does_not_fit_is_told_at_the_start(call: Call, base: Path, lora: Path) -> None:
    file = lora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    code, out, err = call("serve", lora, "--model", base, "--port", 0)
    assert (code, out) == (2, "") and "damaged" in err


STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
Path({record!r}).write_text(json.dumps([sys.argv[1:], os.environ.get("VLLM_API_KEY")]))
sys.exit(7)
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A program of that name, which notes how it was called; and what it noted."""
    import json

    place, record = tmp_path / "bin", tmp_path / "called"
    place.mkdir()
    program = place / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable, record=str(record)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")

    def run(program: str, line: list[str], environment: dict[str, str]) -> None:  # this process goes on
        raise SystemExit(subprocess.run([program, *line[1:]], env=environment, check=False).returncode)

    monkeypatch.setattr(os, "execve", run)
    return lambda: json.loads(record.read_text())


def test_vllm_gets_what_it_takes(
    call: Call, base: Path, lora: Path, tmp_path: Path, vllm: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COADAPT_API_KEY", "secret")
    large = saved(base, tmp_path / "large", LoraConfig(r=24))
    with pytest.raises(SystemExit, match="7"):
        call("serve", lora, "--adapter", f"b={large}", "--engine", "vllm", "--model", base, "--port", 8123, "--rows", 9)
    args, key = vllm()
    assert key == "secret" and "secret" not in " ".join(args)
    modules = [f"lora={lora.resolve()}", f"b={large.resolve()}"]
    assert args == [
        *("serve", str(base), "--host=127.0.0.1", "--port=8123", "--max-num-seqs=9"),
        *("--enable-lora", "--max-lora-rank=32", "--max-loras=2", "--lora-modules", *modules),
    ]


def test_vllm_gets_an_export_of_what_becomes_a_lora(
    call: Call, base: Path, tmp_path: Path, vllm: Callable[[], Any]
) -> None:
    both = saved(base, tmp_path / "both", LoraConfig(r=4), second=LoraConfig(r=2))
    with pytest.raises(SystemExit, match="7"):
        call("serve", both, "--engine", "vllm", "--model", base)
    args, key = vllm()
    assert key is None
    assert args[-1] == f"both={(tmp_path / 'both-vllm').resolve()}"
    tokens = torch.tensor([[1, 70, 71, 72]])
    views = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        for folder in (both, tmp_path / "both-vllm")
    ]
    assert list(views[1].peft_config) == ["default"]
    assert torch.allclose(views[0](tokens).logits, views[1](tokens).logits, atol=1e-5)


def test_vllm_is_refused_what_it_does_not_take(
    call: Call, base: Path, lora: Path, tmp_path: Path, vllm: Callable[[], Any]
) -> None:
    prompt = saved(base, tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=3))
    biased = saved(base, tmp_path / "biased", LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call(
        "serve", lora, "--adapter", prompt, "--adapter", biased, "--engine", "vllm", "--model", base
    )  # fmt: skip
    assert code == 2
    assert "prompt: it takes LoRA only" in err and "Serve it with coadapt" in err
    assert "biased: B has biases" in err and f"coadapt export {biased} --for vllm --merged" in err
    assert "lora:" not in err and sorted(tmp_path.rglob("*")) == before
    code, _, err = call("serve", lora, "--engine", "vllm", "--queue", 5, "--use-cpu")
    assert code == 2 and "--queue, --use-cpu has no effect" in err


def test_vllm_that_is_not_there_is_told_with_the_command(
    call: Call, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("serve", lora, "--engine", "vllm", "--model", base)
    assert code == 2 and "pip install vllm" in err
    assert f"vllm serve {base} --host=127.0.0.1 --port=8000 --enable-lora" in err
