"""train, generate, merge and show on a model made here: what each writes is what the next one reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coadapt import PeftModel

Call = Callable[..., tuple[int, str, str]]
TRAIN = ("--num-train-epochs", 2, "--use-cpu", "--lr", "1e-2", "--logging-steps", 2)


@pytest.fixture
def trained(call: Call, base: Path, rows: Path, tmp_path: Path) -> Path:
    out = tmp_path / "adapter"
    code, _, said = call(
        "train", "--model", base, "--data", rows, "--method", "prompt + lora", "--r", 4, *TRAIN, "--output-dir", out
    )
    assert code == 0, said
    assert "hint: lr is called learning_rate here." in said
    return out


def test_flags_yaml_and_overrides_are_one_vocabulary(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {base}\ndata: {rows}\nadapters: {{a: {{method: lora, r: 2}}, b: {{method: prompt}}}}\n")
    code, text, said = call(
        "train",
        "--config",
        config,
        "--max_steps",
        1,
        "adapters.a.r=3",
        "adapters.b.learning_rate=2e-2",
        f"output_dir={tmp_path / 'out'}",
    )
    assert code == 0, said
    saved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (saved["max_steps"], saved["adapters"]["a"]["r"], saved["adapters"]["b"]["learning_rate"]) == (1, 3, 2e-2)
    assert "max_grad_norm=1.0" in text
    assert "weight_decay=0.0" in text


def test_a_saved_run_is_run_again_to_the_same_numbers(call: Call, trained: Path, tmp_path: Path) -> None:
    code, _, said = call("train", "--config", trained / "run.yaml", "--output-dir", tmp_path / "again")
    assert code == 0, said
    for name in ("prompt", "lora"):
        one, again = (
            load_file(folder / name / "adapter_model.safetensors") for folder in (trained, tmp_path / "again")
        )
        assert one.keys() == again.keys()
        assert all(torch.equal(one[key], again[key]) for key in one)


def test_generate_asks_as_it_was_trained(call: Call, base: Path, trained: Path) -> None:
    _, both, _ = call("generate", "--adapter", trained, "--prompt", "3?", "--max-new-tokens", 5)
    _, alone, _ = call("generate", "--model", base, "--prompt", "3?\n", "--max-new-tokens", 5)
    _, off, _ = call("generate", "--adapter", trained, "--adapters", "0*lora", "--prompt", "3?", "--max-new-tokens", 5)
    assert off == alone != both


def test_sampling_is_seeded(call: Call, base: Path) -> None:
    ask = ("generate", "--model", base, "--prompt", "a", "--temperature", 1.5, "--max-new-tokens", 12)
    texts = [call(*ask, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_merge_makes_a_plain_model_with_the_adapter_s_logits(
    call: Call, base: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    code, _, said = call("merge", "--adapter", trained, "--out", out)
    assert (code, out.exists()) == (1, False)
    assert "prompt" in said
    code, _, said = call("merge", "--adapter", trained, "--adapters", "lora", "--out", out)
    assert code == 0, said
    view = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)
    tokens = torch.tensor([[1, 70, 71, 72]])
    merged, adapted = AutoModelForCausalLM.from_pretrained(out)(tokens).logits, view(tokens, adapters="lora").logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert not torch.allclose(merged, view(tokens, adapters="0*lora").logits, atol=1e-3)
    assert call("merge", "--adapter", trained, "--adapters", "lora", "--out", out)[0] == 2
    asked = ("--prompt", "ab", "--max-new-tokens", "8")
    alone = call("generate", "--adapter", trained, "--adapters", "lora", *asked)
    assert call("generate", "--model", out, *asked)[:2] == alone[:2] != (1, "")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_streamed_merge_writes_the_same_files(call: Call, base: Path, trained: Path, tmp_path: Path) -> None:
    asked = ("merge", "--adapter", trained, "--adapters", "lora")
    assert call(*asked, "--out", tmp_path / "memory")[0] == 0
    code, said, _ = call(*asked, "--out", tmp_path / "stream", "--stream")
    assert code == 0 and "One weight at a time" in said
    names = sorted(p.name for p in (tmp_path / "memory").iterdir())
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert sorted(p.name for p in (tmp_path / "stream").iterdir()) == names
    for name in names:
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "stream" / name).read_bytes(), name
    assert call(*asked, "--out", tmp_path / "other", "--stream", "--use-cpu")[0] == 2


def test_show_counts_what_there_is(call: Call, base: Path, trained: Path) -> None:
    view = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)
    numbers = {name: view.get_adapter(name).weight.numel() for name in ("prompt", "lora")}
    total = sum(p.numel() for p in view.get_base_model().parameters())
    _, text, _ = call("show", trained)
    assert f"{sum(numbers.values()):,}, {sum(numbers.values()) / total:.2%} of the base's {total:,}" in text
    assert f"lora · lora · {numbers['lora']:,} parameters" in text
    assert f"prompt · prompt_tuning · {numbers['prompt']:,} parameters" in text
    assert "prompt + lora" in text
    row = next(line for line in text.splitlines() if "q_proj" in line)
    assert row.split() == ["model.layers.*.self_attn.q_proj", "2", "lora_A", "4x32,", "lora_B", "32x4", "512"]
    _, layers, _ = call("show", "--model", base)
    assert f"LlamaForCausalLM · {total:,} parameters" in layers
    lines = [line.split() for line in layers.splitlines()]
    count = sum(1 for name, _ in view.get_base_model().named_modules() if name.endswith("q_proj"))
    assert ["attention", "query", str(count), "model.layers.0.self_attn.q_proj"] in lines
    assert ["prompt_tuning", "1", "model"] in lines


def test_show_reads_what_a_trainer_wrote(call: Call, trained: Path) -> None:
    code, text, said = call("show", trained / "last")
    assert code == 0, said
    whole = call("show", trained)[1]
    assert text.splitlines()[1:3] == whole.splitlines()[1:3]
    row = next(line for line in text.splitlines() if "q_proj" in line)
    assert row.split() == ["model.layers.*.self_attn.q_proj", "2", "A", "4x32,", "B", "32x4", "512"]


def test_colours_only_where_they_are_wanted(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = call("show", trained)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = call("show", trained)[1]
    assert "\x1b[" in coloured
    assert "\x1b[3" not in plain
