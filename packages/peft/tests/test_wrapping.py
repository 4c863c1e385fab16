"""A model with adapters as the class of its method, as a copy, with another adapter in the place of one, as numbers."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from tiny import llama, moved
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import coadapt
from cases import CASES
from coadapt.config import CONFIGS

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
BEARABLE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
WRAPPED = [name for name in peft.__all__ if name.endswith("Model") and isinstance(getattr(peft, name), type)]
WRAPPED = [name for name in WRAPPED if issubclass(getattr(peft, name), BaseTuner)]


def saved(folder: Path, seed: int = 1, **options: Any) -> Path:
    """A LoRA that does something."""
    view = peft.get_peft_model(llama(), peft.LoraConfig(**{**LORA, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in view.get_adapter("default").parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    view.save_pretrained(folder)
    return folder


def with_one(folder: Path, injected: bool) -> Any:
    if not injected:
        return peft.PeftModel.from_pretrained(llama(), folder)
    model = llama()
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("name", WRAPPED)
def test_each_method_has_its_class(name: str) -> None:
    assert len(WRAPPED) == 38
    cls = getattr(peft, name)
    assert getattr(peft, f"{name.removesuffix('Model')}Config").kind == cls.kind == peft.PeftType(cls.kind)
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(cls.kind)] is cls
    with pytest.raises(ValueError, match=f"A {name} has adapters of {cls.kind}"):
        cls(llama(), peft.PromptTuningConfig(num_virtual_tokens=2), "default")


def test_a_wrapped_model_is_called_steered_and_given_back(ids: Tensor, tmp_path: Path) -> None:
    model = llama()
    keys, plain = set(model.state_dict()), model(ids).logits
    wrapped = LoraModel(model, peft.LoraConfig(**LORA), "a")
    moved(wrapped)
    adapted = wrapped(ids).logits
    assert wrapped.model is model and torch.equal(model(ids).logits, adapted)
    assert not torch.allclose(adapted, plain) and wrapped.config is model.config
    wrapped.disable_adapter_layers()
    assert torch.equal(wrapped(ids).logits, plain)
    wrapped.enable_adapter_layers()
    LoraModel(model, {"b": peft.LoraConfig(**LORA, init_lora_weights=False)}, "b")
    assert wrapped.active_adapter == "b" and not torch.equal(wrapped(ids).logits, adapted)
    wrapped.add_weighted_adapter(["a", "b"], [1.0, 0.0], "both", "cat")
    wrapped.set_adapter("both")
    torch.testing.assert_close(wrapped(ids).logits, adapted, **BEARABLE)
    wrapped.delete_adapter("b")
    assert list(wrapped.peft_config) == ["a", "both"] and wrapped.active_adapters == ["both"]
    wrapped.set_adapter("a")
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(ids).logits, adapted, **BEARABLE)
    wrapped.unmerge_adapter()
    assert wrapped.unload() is model
    assert torch.equal(model(ids).logits, plain) and set(model.state_dict()) == keys
    assert not hasattr(model, "peft_adapters") and not model.__dict__.keys() & {"generate", "__deepcopy__"}
    again = LoraModel(model, peft.LoraConfig(**LORA), "a")
    moved(again)
    adapted = again(ids).logits
    merged = again.merge_and_unload()
    assert merged is model and set(model.state_dict()) == keys
    torch.testing.assert_close(model(ids).logits, adapted, **BEARABLE)


def test_the_base_model_of_a_view_is_one(ids: Tensor) -> None:
    view: Any = peft.get_peft_model(llama(), peft.LoraConfig(**LORA))
    moved(view.get_adapter("default"))
    face = view.base_model
    assert isinstance(face, LoraModel) and not isinstance(face, peft.IA3Model)
    assert face.model is view.get_base_model() and face.config is view.config
    assert torch.equal(face(ids).logits, view(ids).logits)
    assert torch.equal(face.generate(ids, max_new_tokens=3), view.generate(ids, max_new_tokens=3))
    adapted, plain = view(ids).logits, llama()(ids).logits
    face.disable_adapter_layers()
    assert torch.equal(view(ids).logits, plain) and not view.get_model_status().enabled
    view.add_adapter("ia3", peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    view.set_adapter("default")
    assert torch.equal(view(ids).logits, plain)
    face.enable_adapter_layers()
    assert torch.equal(view(ids).logits, adapted)
    assert type(view.base_model) is BaseTuner  # of two methods it is neither's class
    named = {status.name for status in view.get_layer_status()}
    assert all(face.get_submodule(name) is not None for name in named)
    virtual = peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not isinstance(virtual.base_model, BaseTuner)


def by_pickle(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
def test_a_copy_has_adapters_of_its_own(how: Any, ids: Tensor) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "a")
    model.add_adapter(peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False), "b")
    moved(model.peft_adapters)
    model.set_adapter(["a", "b"])
    model.peft_adapters.set_scale("b", 0.5)
    adapted, keys = model(ids).logits, list(model.state_dict())
    other = how(model)
    assert type(other).__name__ == "LlamaForCausalLM" and torch.equal(other(ids).logits, adapted)
    assert torch.equal(model(ids).logits, adapted) and list(other.state_dict()) == keys
    assert other.active_adapters() == ["a", "b"] and other.peft_config.keys() == {"a", "b"}
    assert torch.equal(other.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in other.named_parameters()} == trains
    moved(other.peft_adapters)
    assert torch.equal(model(ids).logits, adapted) and not torch.allclose(other(ids).logits, adapted)
    other(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in other.parameters())
    other.delete_adapter(["a", "b"])
    assert torch.equal(other(ids).logits, llama()(ids).logits) and torch.equal(model(ids).logits, adapted)


def test_such_a_model_is_compiled_as_one_graph_for_each_composition(ids: Tensor) -> None:
    model = llama()
    for name in ("a", "b"):
        model.add_adapter(peft.LoraConfig(**LORA, init_lora_weights=False), name)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=graphs, fullgraph=True)
    for active, seen in (("a", 1), ("b", 2), (["a", "b"], 3), ("a", 3)):
        model.set_adapter(active)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **BEARABLE)
        assert graphs.frame_count == seen
    found = []
    for called in (model, compiled):
        model.zero_grad()
        called(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 8
    assert all(torch.allclose(g, found[1][n], atol=1e-6) for n, g in found[0].items())


def test_a_part_of_such_a_model_is_not_copied_without_its_adapters() -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(**LORA))
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="part of a model with injected adapters"):
            how(model.model.layers[0])


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("rank", [4, 2, 7])
def test_another_adapter_takes_the_place_of_one(tmp_path: Path, ids: Tensor, rank: int, injected: bool) -> None:
    first, second = saved(tmp_path / "one"), saved(tmp_path / "two", 2, r=rank, lora_alpha=3)
    model = with_one(first, injected)
    wanted, before = with_one(second, injected)(ids).logits, model(ids).logits
    hotswap.hotswap_adapter(model, second, "default")
    assert not torch.allclose(before, wanted) and torch.equal(model(ids).logits, wanted)
    hotswap.hotswap_adapter(model, first, "default")
    assert torch.equal(model(ids).logits, before)
    state = {
        key.removeprefix("base_model.model.").replace("A.weight", "A.default.weight"): tensor
        for key, tensor in peft.load_peft_weights(second).items()
    }
    config = peft.PeftConfig.from_pretrained(second)
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
    assert torch.equal(model(ids).logits, wanted)
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="1 keys are missing or unexpected"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap.check_hotswap_configs_compatible(config, peft.IA3Config())
    assert torch.equal(model(ids).logits, wanted)
    if injected:
        model.peft_adapters.merge()
    else:
        model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        hotswap.hotswap_adapter(model, first, "default")


def test_arrow_chooses_among_folders(tmp_path: Path, ids: Tensor) -> None:
    tasks = [saved(tmp_path / f"t{i}", i) for i in range(3)]
    general = [saved(tmp_path / f"g{i}", 7 + i) for i in range(2)]
    view = peft.create_arrow_model(llama(), tasks, peft.ArrowConfig(top_k=2, router_temperature=0.5))
    by_hand = coadapt.PeftModel(llama())
    for i, folder in enumerate(tasks):
        by_hand.load_adapter(folder, f"task_{i}")
    by_hand.eval().set_adapter("arrow(task_0, task_1, task_2, top_k=2, temperature=0.5)")
    assert torch.equal(view(ids).logits, by_hand(ids).logits)
    config = peft.ArrowConfig(top_k=2, use_gks=True)
    purified = peft.create_arrow_model(llama(), tasks, config, general)
    assert (config.task_adapter_names, config.gks_adapter_names) == (["task_0", "task_1", "task_2"], ["gks_0", "gks_1"])
    at = "sites.model/layers/0/self_attn/q_proj/lora.A"
    mean = sum(purified.get_adapter(f"gks_{i}").get_parameter(at) for i in range(2)) / 2
    torch.testing.assert_close(
        purified.get_adapter("task_0").get_parameter(at), view.get_adapter("task_0").get_parameter(at) - mean
    )
    with pytest.raises(ValueError, match="belong together"):
        peft.create_arrow_model(llama(), tasks, peft.ArrowConfig(use_gks=True))


def test_cartridges_are_joined_and_started_from_a_cache(tmp_path: Path, ids: Tensor) -> None:
    folders = []
    for i, n in enumerate((3, 2)):
        view = peft.get_peft_model(llama(), peft.CartridgeConfig(num_virtual_tokens=n, task_type="CAUSAL_LM"))
        cache = llama()(ids[i : i + 1], use_cache=True).past_key_values
        peft.initialize_kv_prefix_from_past_key_values(view, past_key_values=cache)
        view.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))
        stored = peft.load_peft_weights(folders[-1])["prompt_embeddings"]
        assert torch.equal(stored, peft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=n))
    peft.compose_cartridge_adapters(folders, output_path=tmp_path / "both")
    both = peft.PeftModel.from_pretrained(llama(), tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 5 and both.peft_config["default"].num_frozen_tokens == 1
    stored = [peft.load_peft_weights(folder)["prompt_embeddings"] for folder in (*folders, tmp_path / "both")]
    assert torch.equal(torch.cat(stored[:2]), stored[2])
    with pytest.raises(ValueError, match="At least two"):
        peft.compose_cartridge_adapters(folders[:1], output_path=tmp_path / "one")


def test_the_status_of_an_injected_model() -> None:
    model = llama()
    with pytest.raises(ValueError, match="There are no adapters"):
        peft.get_layer_status(model)
    model.add_adapter(peft.LoraConfig(**LORA))
    model.disable_adapters()
    whole = peft.get_model_status(model)
    assert (whole.enabled, whole.active_adapters, whole.adapter_model_type) == (False, ["default"], "None")
    assert (whole.base_model_type, whole.num_adapter_layers) == ("LlamaForCausalLM", 4)
    assert peft.get_layer_status(model)[0].name == "model.layers.0.self_attn.q_proj"
    config, state = peft.convert_to_lora(model, 0.9)
    assert config.r >= 1 and all(key.startswith("base_model.model.model.layers") for key in state)
    view: Any = peft.get_peft_model(llama(), peft.LoraConfig(**LORA))
    assert peft.get_model_status(view).adapter_model_type == "LoraModel"
    assert peft.get_layer_status(view)[0].name == "model.model.layers.0.self_attn.q_proj"


def test_all_methods_of_the_tests_have_a_class_or_are_virtual_tokens() -> None:
    kinds = {str(case.peft_type) for case in CASES.values()} & {str(k) for k in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    virtual = {kind for kind in kinds if issubclass(CONFIGS[kind], peft.PromptLearningConfig)}
    assert kinds - virtual <= {str(k) for k in peft.PEFT_TYPE_TO_TUNER_MAPPING}


def test_a_swap_compiles_nothing_anew_where_there_is_room(tmp_path: Path, ids: Tensor) -> None:
    folders = [saved(tmp_path / str(r), r, r=r, lora_alpha=2 * r + 1) for r in (4, 2, 7)]
    view = peft.PeftModel.from_pretrained(llama(), folders[0])
    hotswap.prepare_model_for_compiled_hotswap(view, target_rank=8)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(view, backend=graphs)
    for folder in (*folders, folders[0]):
        hotswap.hotswap_adapter(view, folder, "default")
        with torch.no_grad():
            wanted = peft.PeftModel.from_pretrained(llama(), folder)(ids).logits
            torch.testing.assert_close(compiled(ids).logits, wanted, **BEARABLE)
    assert graphs.frame_count == 1
    with pytest.raises(ValueError, match="No adapter layers"):
        hotswap.prepare_model_for_compiled_hotswap(peft.PeftModel(llama()), target_rank=8)
