"""How LoRA starts: as peft does with the same weights, but that the base stays what it is."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import coadapt
from coadapt import PeftModel, get_peft_model
from coadapt.methods.lora import LoRA
from formats.field import far, field_gradients, field_loaded, field_logits, field_quietly
from models import FAMILIES, MODELS, logits, stir

OPTIONS = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def made(start: str, model: str = "llama", **options: Any) -> tuple[PeftModel, Any]:
    """The same in both libraries."""
    options = {**OPTIONS, **options, "init_lora_weights": start}
    torch.manual_seed(3)
    ours = get_peft_model(MODELS[model](), coadapt.LoraConfig(**options)).eval()
    torch.manual_seed(3)
    field = field_quietly(lambda: peft.get_peft_model(MODELS[model](), peft.LoraConfig(**options))).eval()
    return ours, field


def factors(field: Any, path: str) -> tuple[Tensor, Tensor]:
    layer = field.base_model.model.get_submodule(path)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def copy_into(field: Any, ours: PeftModel) -> None:
    """The values of A and B, which may have another start."""
    for part in ours.get_adapter("default").parts:
        for mine, theirs in zip((part.method.A, part.method.B), factors(field, part.place.path), strict=True):  # type: ignore[arg-type]
            theirs.data.copy_(mine.data)


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_a_and_b_start_as_the_fields(start: str) -> None:
    """Singular vectors have no sign of their own: so their products are compared."""
    ours, field = made(start)
    for part in ours.get_adapter("default").parts:
        method: Any = part.method
        a, b = factors(field, part.place.path)
        assert far(method.B @ method.A, b @ a) < 1e-5, part.place.path
        assert far(method.B @ method.B.mT, b @ b.mT) < 1e-5, part.place.path


def test_the_fast_pissa_is_nearly_the_best_of_its_rank() -> None:
    ours, _ = made("pissa_niter_8")
    for part in ours.get_adapter("default").parts:
        method: Any = part.method
        weight: Any = part.place.module.weight
        best = torch.linalg.svdvals(weight)[4:].norm()
        left = (weight - method.scale * method.B @ method.A).detach().norm()
        assert float(best) - 1e-5 < float(left) < 1.05 * float(best)


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_base_stays_and_nothing_changes(start: str, model: str) -> None:
    base = MODELS[model]()
    before, expected = {k: v.clone() for k, v in base.state_dict().items()}, logits(base)
    view = get_peft_model(base, coadapt.LoraConfig(r=4, init_lora_weights=start))
    assert far(logits(view), expected) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in view.get_base_model().state_dict().items())
    assert not any("0" in name.rpartition(".")[2] for name, p in view.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_outputs_and_gradients_are_the_fields(start: str) -> None:
    ours, field = made(start)
    copy_into(field, ours)
    stir(ours.adapters)
    copy_into(field, ours)
    assert far(logits(ours), field_logits(field)) < 1e-5
    for model, out in ((ours, logits(ours)), (field, field_logits(field))):
        (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).sum().backward()
        assert model
    theirs = field_gradients(field)
    for part in ours.get_adapter("default").parts:
        method: Any = part.method
        for name in ("A", "B"):
            key = f"base_model.model.{part.place.path}.lora_{name}.weight"
            gradient = getattr(method, name).grad
            if gradient is None:
                assert (start, name) == ("mica", "B")
            else:
                assert far(gradient, theirs[key]) < 1e-5 * max(1.0, float(theirs[key].abs().max())), key


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_field_reads_one_lora_of_twice_the_rank(start: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, _ = made(start, **options)
    stir(ours.adapters)
    ours.save_pretrained(tmp_path)
    assert far(field_logits(field_loaded(MODELS["llama"](), tmp_path)), logits(ours)) < 1e-5
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path, is_trainable=True)
    assert torch.equal(logits(again.eval()), logits(ours))
    assert again.get_adapter("default").config.to_dict()["init_lora_weights"] == start
    mine, theirs = ours.get_adapter("default").state_dict(), again.get_adapter("default").state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine), "what is frozen stays apart from what trains"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_fields_folder_whose_base_had_changed(start: str, tmp_path: Path) -> None:
    _, field = made(start)
    with torch.no_grad():
        for parameter in (p for p in field.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    expected = field_logits(field)
    field_quietly(lambda: field.save_pretrained(tmp_path))
    base = MODELS["llama"]()
    with pytest.warns(UserWarning, match="worked out again"):
        view = PeftModel.from_pretrained(base, tmp_path)
    assert far(expected, logits(base)) > 1e-3
    assert far(logits(view), expected) < 1e-5


def test_the_fields_folder_that_it_has_converted(tmp_path: Path) -> None:
    _, field = made("pissa")
    field.peft_config["default"].init_lora_weights = True
    field_quietly(lambda: field.save_pretrained(tmp_path / "start"))
    field.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in (p for p in field.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    expected = field_logits(field)
    field_quietly(
        lambda: field.save_pretrained(tmp_path / "to", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    )
    assert far(logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "to")), expected) < 1e-5


def test_mica_trains_a_alone_and_the_field_reads_it(tmp_path: Path) -> None:
    ours, field = made("mica")
    assert {n.rpartition(".")[2] for n, p in ours.named_parameters() if p.requires_grad} == {"A"}
    ours.unfreeze()
    assert {n.rpartition(".")[2] for n, p in ours.named_parameters() if p.requires_grad} == {"A"}
    stir(ours.adapters)
    ours.save_pretrained(tmp_path / "ours")
    loaded = field_loaded(MODELS["llama"](), tmp_path / "ours")
    assert far(field_logits(loaded), logits(ours)) < 1e-5
    copy_into(field, ours)
    field_quietly(lambda: field.save_pretrained(tmp_path / "field"))
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "field", is_trainable=True)
    assert far(logits(again.eval()), logits(ours)) < 1e-5
    assert {n.rpartition(".")[2] for n, p in again.named_parameters() if p.requires_grad} == {"A"}


def test_orthogonal_is_two_factors_whose_product_is_zero() -> None:
    ours, field = made("orthogonal")
    for part in ours.get_adapter("default").parts:
        method: Any = part.method
        a, b = factors(field, part.place.path)
        assert far(method.B @ method.A, torch.zeros(())) < 1e-6
        for mine, theirs in ((method.A, a), (method.B, b)):
            assert mine.shape == theirs.shape
            assert 0.4 < float(mine.detach().std() / theirs.detach().std()) < 2.5
    with pytest.raises(ValueError, match="r must be even"):
        made("orthogonal", r=3)


def test_what_cannot_start_so_says_so() -> None:
    with pytest.raises(ValueError, match=r"'pisa' is not one of .*'pissa'.*Did you mean 'pissa'"):
        coadapt.LoraConfig(init_lora_weights="pisa")
    with pytest.raises(ValueError, match="needs a number"):
        coadapt.LoraConfig(init_lora_weights="pissa_niter_[n]")
    with pytest.raises(ValueError, match=r"has 16; r=20 is too many"):
        get_peft_model(MODELS["llama"](), coadapt.LoraConfig(r=20, init_lora_weights="pissa"))


def test_experts_start_each_by_itself() -> None:
    base = FAMILIES["mixtral"]()
    before = logits(base)
    config = coadapt.LoraConfig(r=4, target_parameters=["experts.down_proj"], init_lora_weights="pissa")
    view = get_peft_model(base, config)
    assert far(logits(view), before) < 1e-5
    method: Any = view.get_adapter("default").parts[0].method
    assert isinstance(method, LoRA)
    weight = base.get_parameter("model.layers.0.mlp.experts.down_proj")[2].detach()
    u, s, vh = torch.linalg.svd(weight)
    expected = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    assert far(method.scale * (method.B[2] @ method.A[2]), expected) < 1e-5
