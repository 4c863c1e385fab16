"""What the table of programs says, against the installed ones where there are any, and the facts of the others."""

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import models
from cases import CASES, VARIANTS
from coadapt import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from coadapt.config import CONFIGS, PeftConfig
from coadapt.formats.facts import Facts, read_facts
from coadapt.formats.programs import PEFT_TYPES, PROGRAMS, Verdict
from models import stir

from .field import field_logits, field_quietly, logits

ON_LLAMA = {
    name: config
    for name, config in (CASES | VARIANTS).items()
    if name not in ("bitfit", "lora-bias", "glora-bias", "lora-tied")
    and not name.endswith("-experts")
    and (not name.startswith("adamss") or importlib.util.find_spec("sklearn"))
}
"""Those that have a place in a Llama; for AdaMSS peft needs scikit-learn."""


def judged(folder: Path, **base: Any) -> dict[str, Verdict]:
    (facts,) = read_facts(folder, base or None).adapters
    return {program.name: program.judge(facts) for program in PROGRAMS}


def saved(folder: Path, config: PeftConfig, base: Any) -> tuple[Path, Tensor]:
    """An adapter's folder, with a base beside it, and the logits of the two."""
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    view = PeftModel(base, config)
    stir(view.adapters, by=0.2)
    view.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(view.eval())


def tried(load: Any, expected: Tensor) -> bool:
    """Whether a program really comes to the same logits."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            found = logits(load().eval())[:, -expected.shape[1] :]
        except (ValueError, KeyError, RuntimeError, ImportError):
            return False
    return bool((found - expected).abs().max() < 1e-5)


# ---- those that are installed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_LLAMA)
def test_peft_and_transformers_do_what_is_said_of_them(name: str, tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, ON_LLAMA[name], models.llama())
    said = judged(folder)

    def peft_loads() -> Any:
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)

    assert said["peft"].loads == tried(peft_loads, expected), said["peft"]
    assert said["transformers"].loads == tried(lambda: AutoModelForCausalLM.from_pretrained(folder), expected)


def test_the_known_types_are_those_of_the_installed_peft() -> None:
    assert {str(kind.value) for kind in peft.PeftType} >= PEFT_TYPES & set(CONFIGS)
    assert {kind for kind in CONFIGS if kind in {str(t.value) for t in peft.PeftType}} == PEFT_TYPES & set(CONFIGS)


def test_the_fields_own_folder_of_dora_is_not_loaded_by_transformers(tmp_path: Path) -> None:
    """So it is the loader's mistake, and not our file's: what peft wrote itself comes out wrong, too."""
    models.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM")
    model = field_quietly(lambda: peft.get_peft_model(base, config))
    for key, value in model.named_parameters():
        if "magnitude" in key:
            value.data.mul_(1.5)
    field_quietly(lambda: model.save_pretrained(tmp_path / "adapter"))
    expected = field_logits(model)
    assert not tried(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), expected)
    assert not judged(tmp_path / "adapter")["transformers"].loads


# ---- those that are not ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"), models.llama())[0]


def changed(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields), "utf-8")
    return folder


def loads(verdicts: Mapping[str, Verdict]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict.loads}


LLAMA = {"model_type": "llama", "num_hidden_layers": 2}
ALL_BUT_MLX = {program.name for program in PROGRAMS} - {"MLX"}


def test_a_plain_lora_loads_everywhere_but_in_mlx(folder: Path) -> None:
    said = judged(folder, **LLAMA)
    assert loads(said) == ALL_BUT_MLX
    assert said["MLX"].command == f"coadapt export {folder} --for mlx"
    assert said["vLLM"].command == f"vllm serve {folder.parent}/base --enable-lora --lora-modules default={folder}"


NO: dict[str, tuple[dict[str, Any], set[str]]] = {
    "rslora": ({"use_rslora": True}, {"llama.cpp", "Ollama"}),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, {"TGI", "Ollama"}),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, {"TGI", "llama.cpp", "Ollama"}),
    "alpha": ({"lora_alpha": 8.5}, {"Ollama"}),
    "start": ({"init_lora_weights": "pissa"}, {"vLLM"}),
    "known start": ({"init_lora_weights": "gaussian"}, set()),
    "bias": ({"bias": "all"}, {"vLLM", "TGI", "llama.cpp", "Ollama"}),
    "head": ({"modules_to_save": ["lm_head"]}, {"vLLM", "TGI", "llama.cpp", "Ollama"}),
    "classifier": ({"modules_to_save": ["score"]}, {"TGI", "llama.cpp", "Ollama"}),
    "dora": ({"use_dora": True}, {"transformers", "vLLM", "TGI", "llama.cpp", "Ollama"}),
    "other": ({"peft_type": "LOHA"}, {"vLLM", "TGI", "llama.cpp", "Ollama"}),
    "unknown": ({"peft_type": "LORB"}, ALL_BUT_MLX),
}
"""Fields of the file -> the programs that refuse them or get them wrong (FORMATS, section 2)."""


@pytest.mark.parametrize("name", NO)
def test_each_program_refuses_what_it_gets_wrong(name: str, folder: Path) -> None:
    fields, refusing = NO[name]
    assert loads(judged(changed(folder, **fields), **LLAMA)) == ALL_BUT_MLX - refusing


@pytest.mark.parametrize(("r", "room"), [(1, None), (16, None), (17, 32), (64, 64), (400, 512), (513, 0)])
def test_vllm_is_given_room_for_the_rank(r: int, room: int | None) -> None:
    facts = Facts(name="a", folder=Path("a"), config={"peft_type": "LORA", "r": r}, tensors={})
    said = next(program for program in PROGRAMS if program.name == "vLLM").judge(facts)
    assert said.loads == (room is None)
    ending = {None: "--lora-modules a=a", 0: "coadapt export a --for vllm --r 512"}
    assert said.command is not None
    assert said.command.endswith(ending.get(room, f"--max-lora-rank {room}"))


def test_a_layer_that_is_missing_is_what_tgi_skips(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers")
    folder, _ = saved(tmp_path, config, models.llama())
    said = judged(folder, **LLAMA)
    assert loads(said) == ALL_BUT_MLX - {"TGI"}
    assert "self_attn.q_proj, self_attn.v_proj" in said["TGI"].reasons[0]
    assert said["TGI"].command == f"coadapt export {folder} --for tgi"


def test_tensors_decide_and_not_only_what_the_settings_say(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    assert loads(judged(folder, **LLAMA)) == ALL_BUT_MLX - {"vLLM", "TGI", "llama.cpp", "Ollama"}
    save_file({**tensors, "base_model.model.model.layers.0.strange": torch.zeros(2)}, file, {"format": "pt"})
    assert not judged(folder, **LLAMA)["llama.cpp"].loads
    save_file({**tensors, "base_model.model.model.norm.weight": torch.zeros(2)}, file, {"format": "pt"})
    assert judged(folder, **LLAMA)["llama.cpp"].loads


def test_ollama_wants_to_know_the_base(folder: Path) -> None:
    assert not judged(folder)["Ollama"].loads
    assert judged(folder, model_type="gemma2")["Ollama"].loads
    assert judged(folder, model_type="gpt2")["Ollama"].reasons == [
        "it takes folders for llama and gemma2 only, and the base is a gpt2"
    ]


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (IA3Config(), "coadapt export {} --for vllm"),
        (CASES["ln-tuning"], "coadapt export {} --for vllm --merged"),
        (VARIANTS["lora-tokens"], "coadapt export {} --for vllm --merged"),
        (PromptTuningConfig(num_virtual_tokens=2), None),
        (PrefixTuningConfig(num_virtual_tokens=2), None),
        (CASES["bottleneck"], None),
    ],
)
def test_what_mends_a_no(config: PeftConfig, command: str | None, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, config, models.llama())
    assert judged(folder)["vLLM"].command == (command and command.format(folder))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_composition_is_judged_part_by_part(tmp_path: Path) -> None:
    view = PeftModel(models.llama(), LoraConfig(r=2), "style")
    view.add_adapter("task", PromptTuningConfig(num_virtual_tokens=2))
    view.set_adapter("task + 0.5*style")
    view.save_pretrained(tmp_path)
    found = read_facts(tmp_path)
    assert {facts.name: facts.kind for facts in found.adapters} == {"style": "LORA", "task": "PROMPT_TUNING"}
    assert repr(found.composition) == repr(view.composition)
    assert found.adapters[0].ranks == {2}


def test_what_a_stock_trainer_writes_is_for_coadapt_only(tmp_path: Path) -> None:
    view = PeftModel(models.llama(), LoraConfig(r=2), "style")
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    Trainer(model=view, args=arguments).save_model(str(tmp_path / "stock"))
    (facts,) = read_facts(tmp_path / "stock").adapters
    verdicts = {program.name: program.judge(facts) for program in PROGRAMS}
    assert not loads(verdicts)
    assert verdicts["peft"].command == f"coadapt export {tmp_path}/stock --for peft --adapters style"


def test_a_folder_without_an_adapter_and_a_damaged_one_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        read_facts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="holds a model, and no adapter"):
        read_facts(tmp_path / "base")
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        read_facts(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="pickle"):
        read_facts(folder)
