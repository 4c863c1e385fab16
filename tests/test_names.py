"""The public names: what there is, what importing costs, and that calls are the field's own."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coadapt


def test_all_is_sorted_and_importable() -> None:
    assert list(coadapt.__all__) == sorted(set(coadapt.__all__))
    assert [name for name in coadapt.__all__ if getattr(coadapt, name, None) is None] == []
    assert dir(coadapt) == list(coadapt.__all__)


def test_nothing_else_is_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'get_pefty_model'"):
        _ = coadapt.get_pefty_model
    assert not hasattr(coadapt, "torch")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys; {code}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import coadapt",
        "import coadapt; dir(coadapt)",
        "import coadapt.config",
        "from coadapt import TaskType, PeftType",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) & {"torch", "transformers", "numpy", "safetensors", "datasets"} == set()


def test_importing_the_calls_loads_torch_and_nothing_else_heavy() -> None:
    heavy = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "sympy"}
    assert loaded_by("from coadapt import LoraConfig, get_peft_model") & heavy == loaded_by("import torch") & heavy


def test_what_is_loaded_is_seen() -> None:
    """The probe above can fail."""
    assert "json" in loaded_by("import json")


EACH_FIRST = """
import importlib, os, sys
import torch, transformers
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.full
def test_any_module_can_be_the_first_that_is_imported() -> None:
    """No name depends on what was imported before it: modules import each other one way."""
    package = Path(coadapt.__file__).parent
    modules = sorted({f"coadapt.{home}" for home in coadapt._HOMES.values()})
    modules += sorted(f"coadapt.core.{file.stem}" for file in (package / "core").glob("[a-z]*.py"))
    ran = subprocess.run([sys.executable, "-c", EACH_FIRST, *modules], capture_output=True, text=True, check=True)
    assert ran.stdout == ""


CALLS: dict[str, list[str]] = {
    "convert_to_lora": ["model", "rank", "adapter_name"],
    "find_kappa_target_modules": ["model", "top_p", "max_dim_size_to_analyze", "moe_param_suffixes"],
    "get_eva_state_dict": ["model", "dataloader", "peft_config", "forward_fn", "adapter_name"],
    "get_layer_status": ["model"],
    "get_model_status": ["model"],
    "initialize_lora_eva_weights": ["model", "dataloader", "eva_state_dict", "forward_fn", "adapter_name"],
    "replace_lora_weights_loftq": ["peft_model", "model_path", "adapter_name", "callback"],
    "save_as_lora": ["path", "model", "rank", "adapter_name"],
    "get_peft_model": ["model", "peft_config", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage"],
    "PeftModel.from_pretrained": [
        "model",
        "model_id",
        "adapter_name",
        "is_trainable",
        "config",
        "autocast_adapter_dtype",
    ],
    "PeftModel.add_adapter": ["adapter_name", "peft_config", "low_cpu_mem_usage", "autocast_adapter_dtype"],
    "PeftModel.load_adapter": ["model_id", "adapter_name", "is_trainable", "autocast_adapter_dtype"],
    "PeftModel.set_adapter": ["adapter_name"],
    "PeftModel.delete_adapter": ["adapter_name"],
    "PeftModel.merge_adapter": ["adapter_names", "safe_merge"],
    "PeftModel.merge_and_unload": ["progressbar", "safe_merge", "adapter_names"],
    "PeftModel.save_pretrained": [
        "save_directory",
        "safe_serialization",
        "selected_adapters",
        "save_embedding_layers",
        "is_main_process",
    ],
    "PeftModel.add_weighted_adapter": [
        "adapters",
        "weights",
        "adapter_name",
        "combination_type",
        "svd_rank",
        "svd_clamp",
        "svd_full_matrices",
        "svd_driver",
        "density",
        "majority_sign_method",
    ],
    "PeftModel.unload": [],
    "PeftModel.unmerge_adapter": [],
    "PeftModel.disable_adapter": [],
    "PeftModel.get_base_model": [],
    "PeftModel.get_layer_status": [],
    "PeftModel.get_model_status": [],
    "PeftModel.get_nb_trainable_parameters": [],
    "PeftModel.print_trainable_parameters": [],
    "PeftConfig.from_pretrained": ["pretrained_model_name_or_path"],
}
"""Arguments that a call shares with the field's, by name."""


def call_of(library: Any, name: str) -> Callable[..., Any]:
    """The call of that name; the field keeps some of its model's verbs on the model inside."""
    owner, _, method = name.rpartition(".")
    inside = importlib.import_module("peft.tuners.lora").LoraModel if library is not coadapt else None
    return getattr(getattr(library, owner, library), method, None) or getattr(inside, method)


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_the_fields_arguments(name: str) -> None:
    found = inspect.signature(call_of(coadapt, name)).parameters
    assert [argument for argument in CALLS[name] if argument not in found] == []


@pytest.mark.parametrize("name", CALLS)
def test_calls_agree_with_the_fields_library(name: str) -> None:
    """The arguments above are the installed library's too; what must be given comes first, in its order."""
    theirs = inspect.signature(call_of(pytest.importorskip("peft"), name)).parameters
    assert [argument for argument in CALLS[name] if argument not in theirs] == []
    needed = [
        n
        for n, p in theirs.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n not in ("self", "cls")
    ]
    ours = [n for n in inspect.signature(call_of(coadapt, name)).parameters if n != "self"]
    assert ours[: len(needed)] == needed


@pytest.mark.parametrize("name", ["LoraConfig", "PromptTuningConfig", "PrefixTuningConfig"])
def test_options_have_the_fields_names_and_defaults(name: str) -> None:
    """What stands in both has the same default, so that a script means the same with either."""
    peft = pytest.importorskip("peft")
    needed: dict[str, Any] = {} if name == "LoraConfig" else {"num_virtual_tokens": 4}
    ours, theirs = getattr(coadapt, name)(**needed), getattr(peft, name)(**needed)
    shared = [f for f in vars(ours) if hasattr(theirs, f)]
    assert len(shared) > 8
    own = {"peft_type", "init_weights"}  # an enum there, text here; a start that is not ours to choose

    def plain(value: Any) -> Any:
        return getattr(value, "value", value)

    assert {f: plain(getattr(ours, f)) for f in shared if f not in own} == {
        f: plain(getattr(theirs, f)) for f in shared if f not in own
    }


def test_task_and_method_names_are_the_fields() -> None:
    peft = pytest.importorskip("peft")
    assert {t.value for t in coadapt.TaskType} == {t.value for t in peft.TaskType}
    assert {"LORA", "PROMPT_TUNING", "PREFIX_TUNING"} <= {t.value for t in coadapt.PeftType} & {
        t.value for t in peft.PeftType
    }
