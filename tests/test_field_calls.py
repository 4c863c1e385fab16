"""Calls that people know from the field, beside those of the model itself: each against the field's own."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import coadapt
from coadapt import IA3Config, LoKrConfig, LoraConfig, PeftModel, PromptTuningConfig
from formats.field import far, field_loaded, field_logits, field_quietly
from laws.setting import ids, logits
from models import gpt2, llama, mixtral, stir
from quant.quantisers import make


def lokr(folder: Path, **options: Any) -> PeftModel:
    """One on Llama, saved, that does something."""
    config = LoKrConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False, **options)
    view = PeftModel(llama(), config)
    stir(view.adapters)
    view.save_pretrained(folder)
    return view.eval()


def test_the_status_is_what_the_field_says_of_the_same_model(tmp_path: Path) -> None:
    view = lokr(tmp_path)
    field: Any = field_quietly(lambda: peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    mine, theirs = view.get_layer_status(), sorted(field.get_layer_status(), key=lambda layer: layer.name)
    assert [f"model.{layer.name}" for layer in mine] == [layer.name for layer in theirs]
    same = "enabled active_adapters merged_adapters requires_grad available_adapters devices quantization_backend"
    for one, other in zip(mine, theirs, strict=True):
        assert {n: getattr(one, n) for n in same.split()} == {n: getattr(other, n) for n in same.split()}
    whole, wanted = view.get_model_status(), field.get_model_status()
    same += " base_model_type peft_types trainable_params total_params num_adapter_layers"
    assert {n: getattr(whole, n) for n in same.split()} == {n: getattr(wanted, n) for n in same.split()}


def test_the_status_follows_what_is_done() -> None:
    view = PeftModel(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]), "a")
    view.add_adapter("b", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    layers = {layer.name: layer for layer in view.get_layer_status()}
    assert layers["lm_head"].module_type == "modules_to_save.Linear"
    both = layers["model.layers.0.self_attn.v_proj"]
    assert (both.module_type, both.available_adapters) == ("lora + ia3.Linear", ["a", "b"])
    view.get_adapter("a").parts[0].method.A.requires_grad_(False)  # type: ignore[union-attr]
    view.freeze("b")
    view.merge_adapter("b")
    whole = view.get_model_status()
    assert whole.requires_grad == {"a": "irregular", "b": False}
    assert (whole.merged_adapters, whole.active_adapters, whole.available_adapters) == (["b"], ["b"], ["a", "b"])
    view.unmerge_adapter()
    view.set_adapter([])
    assert view.get_model_status().enabled is False and view.get_model_status().merged_adapters == []
    with pytest.raises(TypeError, match="takes a PeftModel"):
        coadapt.get_layer_status(llama())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8", "torchao-int8"])
def test_the_status_names_the_quantiser(name: str) -> None:
    view = PeftModel(make(name), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    whole = view.get_model_status()
    assert whole.quantization_backend == "irregular"  # the embedding is not quantised
    called = {"bnb-nf4": "bnb 4bit", "bnb-int8": "bnb 8bit"}.get(name, "torchao")
    assert {layer.quantization_backend for layer in view.get_layer_status()} == {None, called}


@pytest.mark.parametrize("rank", [5, 0.9])
def test_an_adapter_becomes_the_lora_that_the_field_makes_of_it(tmp_path: Path, rank: Any) -> None:
    view = lokr(tmp_path / "lokr", task_type="CAUSAL_LM")
    field: Any = field_quietly(lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "lokr"))
    config, state = coadapt.convert_to_lora(view, rank)
    _, theirs = field_quietly(lambda: peft.convert_to_lora(field, rank))
    assert state.keys() == theirs.keys()
    for key in (k for k in state if ".lora_A." in k):
        other = key.replace("lora_A", "lora_B")
        assert state[key].shape == theirs[key].shape
        assert far(state[other] @ state[key], theirs[other] @ theirs[key]) < 1e-4
    report = coadapt.save_as_lora(tmp_path / "lora", view, rank)
    assert 0 < report.lost < 1  # type: ignore[operator]
    if rank == 0.9:
        assert all(row.lost is not None and row.lost**2 <= 0.1 for row in report.rows)
    again = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert again.peft_config["default"].task_type == "CAUSAL_LM" and isinstance(config, LoraConfig)
    assert far(field_logits(field_loaded(llama(), tmp_path / "lora")), logits(again)) < 1e-5
    assert view.peft_config.keys() == {"default"}  # nothing is attached


def test_what_is_no_change_of_weights_becomes_no_lora() -> None:
    view = PeftModel(llama(), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises((TypeError, ValueError), match=r"svd"):
        coadapt.convert_to_lora(view, 4)
    with pytest.raises(ValueError, match=r"r=0 must be"):
        coadapt.convert_to_lora(PeftModel(llama(), LoraConfig()), 0)


def test_lora_makes_up_for_what_a_quantised_base_has_lost(tmp_path: Path) -> None:
    whole = llama(hidden_size=64, intermediate_size=128)
    save_file({k: v.clone() for k, v in whole.state_dict().items()}, str(tmp_path / "model.safetensors"))
    view = PeftModel(make("bnb-nf4"), LoraConfig(r=8, lora_alpha=24, target_modules="all-linear")).eval()
    before = {p.place.path: p.method.merge(_read(p)) for p in view.get_adapter("default").parts}  # type: ignore[union-attr]
    seen: list[str] = []

    def kept(_: PeftModel, path: str) -> bool:
        seen.append(path)
        return not path.endswith("v_proj")

    coadapt.replace_lora_weights_loftq(view, tmp_path, callback=kept)
    for part in view.get_adapter("default").parts:
        wanted = whole.get_parameter(f"{part.place.path}.weight")
        now, then = (
            float((w - wanted).detach().norm()) for w in (part.method.merge(_read(part)), before[part.place.path])
        )  # type: ignore[union-attr]
        assert now == then if part.place.path.endswith("v_proj") else now < then
        if not part.place.path.endswith("v_proj"):
            lost = torch.linalg.svdvals((wanted - _read(part)).detach())
            assert now == pytest.approx(float(lost[8:].norm()), rel=1e-3)  # no rank 8 does better
    assert seen == [part.place.path for part in view.get_adapter("default").parts]
    with pytest.raises(FileNotFoundError, match="give model_path"):
        coadapt.replace_lora_weights_loftq(view, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no LoRA at a quantised layer"):
        coadapt.replace_lora_weights_loftq(PeftModel(llama(), LoraConfig()), tmp_path)


def _read(part: Any) -> torch.Tensor:
    from coadapt.core.layer import Layer

    return Layer(part.place.module, part.place.path).weight()


def test_what_eva_has_found_is_kept_and_used_later() -> None:
    batches = [{"input_ids": ids(8, 16)}]
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="eva")
    state = coadapt.get_eva_state_dict(llama(), batches, config)
    assert sum(map(len, state.values())) == 4 * 4
    one, other = PeftModel(llama(), config), PeftModel(llama(), config)
    assert all(torch.equal(coadapt.get_eva_state_dict(one, batches)[p], vectors) for p, vectors in state.items())
    coadapt.initialize_lora_eva_weights(one, batches)
    coadapt.initialize_lora_eva_weights(other, eva_state_dict={f"base_model.model.{p}": v for p, v in state.items()})
    for view in (one, other):
        found = {p.place.path: p.method.A for p in view.get_adapter("default").parts}  # type: ignore[union-attr]
        assert found.keys() == state.keys() and all(torch.equal(a, state[p]) for p, a in found.items())
    with pytest.raises(ValueError, match="either a dataloader or"):
        coadapt.initialize_lora_eva_weights(PeftModel(llama(), config))
    with pytest.raises(ValueError, match="fits no layer"):
        coadapt.initialize_lora_eva_weights(PeftModel(llama(), config), eva_state_dict={"lm_head": torch.ones(2, 32)})


@pytest.mark.parametrize("made", [llama, mixtral])
def test_kappa_picks_what_the_field_picks(made: Any) -> None:
    for share in (0.2, 0.5):
        mine = coadapt.find_kappa_target_modules(made(), share)
        assert mine == field_quietly(lambda s=share: peft.find_kappa_target_modules(made(), s, show_progress=False))
    assert PeftModel(made(), LoraConfig(**mine)).get_layer_status()  # type: ignore[arg-type]


def test_kappa_knows_layers_that_store_their_weight_transposed() -> None:
    found = coadapt.find_kappa_target_modules(gpt2(), 1.0)
    assert "transformer.h.0.mlp.c_fc" in found["target_modules"]  # type: ignore[operator]
    assert coadapt.find_kappa_target_modules(gpt2(), 1.0, max_dim_size_to_analyze=40)["target_modules"] != found
    with pytest.raises(ValueError, match="top_p"):
        coadapt.find_kappa_target_modules(gpt2(), 0.0)


@pytest.mark.parametrize("purified", [False, True])
def test_arrow_routes_as_the_field_does(tmp_path: Path, purified: bool) -> None:
    """With one direction that stands out in each: the field approaches it step by step, from a random start."""
    folders = []
    for i in range(5 if purified else 3):
        view = PeftModel(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_seed=i))
        stir(view.adapters, seed=i)
        for part in view.get_adapter("default").parts:
            part.method.A.data[0] *= 8  # type: ignore[union-attr]
            part.method.B.data[:, 0] *= 8  # type: ignore[union-attr]
        view.save_pretrained(tmp_path / str(i))
        folders.append(str(tmp_path / str(i)))
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=purified, rng_seed=0)
    field = field_quietly(lambda: peft.create_arrow_model(llama(), folders[:3], config, folders[3:])).eval()
    view = PeftModel(llama())
    for i, folder in enumerate(folders):
        view.load_adapter(folder, f"task_{i}")
    if purified:
        with torch.no_grad():
            for i in range(3):
                for ours, *general in zip(
                    *(view.get_adapter(f"task_{j}").parameters() for j in (i, 3, 4)), strict=True
                ):
                    ours.sub_(sum(general) / 2)
    view.eval().set_adapter("arrow(task_0, task_1, task_2, top_k=2, temperature=0.7)")
    assert far(logits(view), field_logits(field)) < 1e-4
    assert far(logits(view, adapters="task_0"), field_logits(field)) > 1e-2
