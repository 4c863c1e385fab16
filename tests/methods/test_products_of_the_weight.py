"""HiRA, DeLoRA, MiSS, GLoRA, DEFT and PEANuT against their papers' formulas, and folders of older kinds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coadapt import (
    DeftConfig,
    DeloraConfig,
    GloraConfig,
    HiraConfig,
    MissConfig,
    OFTConfig,
    PeanutConfig,
    PeftModel,
    get_peft_model,
)
from coadapt.config import PeftConfig
from laws.setting import close, far
from models import Holder, llama, logits, stir


def method_at(layer: nn.Module, config: PeftConfig, by: float = 0.3) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    view = PeftModel(Holder(layer), config)
    stir(view.adapters, by=by)
    return view, view.get_adapter("default").parts[0].method


def changed_rank(method: Any, weight: Tensor) -> int:
    with torch.no_grad():
        return int(torch.linalg.matrix_rank(method.merge(weight) - weight, rtol=1e-4))


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_hira_is_of_high_rank() -> None:
    layer = nn.Linear(12, 10)
    _, method = method_at(layer, HiraConfig(r=2, target_modules=["layer"]))
    assert changed_rank(method, layer.weight) == 10  # of a LoRA it would be 2
    expected = layer.weight * (1 + method.B @ method.A)
    close(method.merge(layer.weight), expected.detach())


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_deloras_change_is_bounded_by_lambda_whatever_its_directions(strength: float) -> None:
    """Each rank adds a matrix of norm lambda / r, weighed by the lengths of W's columns."""
    layer = nn.Linear(12, 10)
    _, method = method_at(layer, DeloraConfig(r=3, delora_lambda=strength, target_modules=["layer"]))
    with torch.no_grad():
        method.strength.fill_(strength)
        columns = layer.weight.norm(dim=0)
        for times in (1.0, 100.0):
            method.A.mul_(times)
            method.B.mul_(times)
            change = (method.merge(layer.weight) - layer.weight) / columns
            expected = sum(
                torch.outer(method.B[:, i], method.A[i]) / (method.B[:, i].norm() * method.A[i].norm())
                for i in range(3)
            )
            close(change, expected * strength / 3, 1e-5)
            assert float(change.norm()) <= strength * 1.0001


def test_miss_adds_one_shard_over_and_over() -> None:
    layer = nn.Linear(7, 5)  # 7 is no multiple of 3
    _, method = method_at(layer, MissConfig(r=3, target_modules=["layer"]))
    change = (method.merge(layer.weight) - layer.weight).detach()
    for column in range(7):
        close(change[:, column], method.D[column % 3].detach())


def test_gloras_five_parts() -> None:
    layer = nn.Linear(6, 4)
    config = GloraConfig(r=2, config_D_E="vector", target_modules=["layer"])
    view, method = method_at(layer, config)
    a, b, c = (getattr(method, n).Xd @ getattr(method, n).Xu for n in "ABC")
    d, e = method.D.X, method.E.X
    x = torch.randn(3, 6)
    weight = layer.weight + layer.weight * a + b
    bias = layer.bias + layer.bias * d + e + (layer.weight @ c)[:, 0]
    close(view(x), x @ weight.mT + bias)
    view.merge_adapter()
    close(view.base(x), (x @ weight.mT + bias).detach())
    view.unmerge_adapter()


def test_glora_on_top_of_another_reads_what_that_made() -> None:
    """C reads the weight below it, A and D what is there to be scaled."""
    layer = nn.Linear(6, 4)
    view = PeftModel(Holder(layer), GloraConfig(r=2, target_modules=["layer"]), "one")
    view.add_adapter("two", GloraConfig(r=2, target_modules=["layer"]))
    stir(view.adapters, by=0.3)
    x = torch.randn(3, 6)
    stacked = view(x, adapters="one >> two").detach()
    view.merge_adapter(["one"])
    other = PeftModel(Holder(nn.Linear(6, 4)), GloraConfig(r=2, target_modules=["layer"]))
    other.base.layer.load_state_dict(layer.state_dict())
    other.get_adapter("default").load_state_dict(view.get_adapter("two").state_dict())
    close(other(x).detach(), stacked)
    view.unmerge_adapter()


def test_para_takes_directions_out() -> None:
    layer = nn.Linear(12, 10)
    _, method = method_at(layer, DeftConfig(r=3, para=True, decomposition_method="qr", target_modules=["layer"]))
    with torch.no_grad():
        changed = method.merge(layer.weight)
        close(method.P.mT @ changed, torch.zeros(3, 12))
    assert int(torch.linalg.matrix_rank(changed, rtol=1e-4)) == 7


@pytest.mark.parametrize("how", ["relu", "qr"])
@pytest.mark.parametrize("alpha", [None, 8])
def test_deft_starts_with_what_it_takes_out(how: str, alpha: int | None) -> None:
    base = llama()
    view = get_peft_model(base, DeftConfig(r=4, decomposition_method=how, alpha=alpha))
    close(logits(view), logits(base), 1e-5)
    with torch.no_grad():
        for part in view.get_adapter("default").parts:
            part.method.R.zero_()  # type: ignore[union-attr, operator]
    far(logits(view), logits(base))


def test_peanut_is_a_network_on_the_weight() -> None:
    layer = nn.Linear(6, 4)
    _, method = method_at(layer, PeanutConfig(r=3, depth=2, scaling=0.5, target_modules=["layer"]))
    h1 = torch.relu(layer.weight.mT @ method.A.mT)
    h2 = torch.relu(method.encoders[0](h1))
    h = torch.relu(method.encoders[1](h2))
    h = torch.relu(method.decoders[0](h)) + h2
    h = torch.relu(method.decoders[1](h)) + h1
    close(method.merge(layer.weight), layer.weight + 0.5 * (h @ method.B.mT).mT)


# ---- folders ---------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    said = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in said.items() if v != "absent"}))


@pytest.mark.parametrize("form", [True, "bat"])
def test_bone_is_read_as_miss(form: bool | str, tmp_path: Path) -> None:
    view = get_peft_model(llama(), MissConfig(r=4, init_weights=form))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    rewritten(tmp_path, peft_type="BONE", miss_dropout="absent", mini_r="absent", init_weights=form)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("miss_block", "bone_block"): t for k, t in load_file(file).items()}, file)
    with pytest.warns(UserWarning, match="Bone is called MiSS now"):
        again = PeftModel.from_pretrained(llama(), tmp_path)
    close(logits(again), logits(view.eval()))


def test_ofts_older_folders_are_told_apart(tmp_path: Path) -> None:
    view = get_peft_model(llama(), OFTConfig(oft_block_size=8))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    rewritten(tmp_path, peft_version="absent")
    with pytest.warns(UserWarning, match=r"before peft 0\.18"):
        PeftModel.from_pretrained(llama(), tmp_path)
    rewritten(tmp_path, oft_block_size="absent")
    with pytest.raises(ValueError, match=r"before peft 0\.14"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_ranks_by_layer_are_ours_alone(tmp_path: Path) -> None:
    """The field's HiRA has the option and does not read it."""
    view = get_peft_model(llama(), HiraConfig(r=4, rank_pattern={"q_proj": 2}))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["readable_by_peft"] is False
    close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(view.eval()))
    plain = get_peft_model(llama(), HiraConfig(r=4))
    stir(plain.adapters)
    plain.save_pretrained(tmp_path / "plain")
    rewritten(tmp_path / "plain", rank_pattern={"q_proj": 2})  # as the field writes it
    close(logits(PeftModel.from_pretrained(llama(), tmp_path / "plain")), logits(plain.eval()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: get_peft_model(llama(), MissConfig(r=40)), "r=40 must be no more than the first"),
        (lambda: get_peft_model(llama(), MissConfig(r=5, init_weights="bat")), "must divide"),
        (lambda: MissConfig(mini_r=2), "mini_r has no effect"),
        (lambda: MissConfig(init_weights="bat", miss_dropout=0.1), "miss_dropout has no effect"),
        (lambda: DeftConfig(para=True, alpha=3), "alpha has no effect with para=True"),
        (lambda: DeftConfig(init_scale=0.5), "init_scale has no effect"),
        (lambda: PeanutConfig(act_fn="relo"), "act_fn='relo' is not one of"),
        (
            lambda: get_peft_model(llama(), GloraConfig(config_A_B="none")),
            "nothing trains at .* which has no bias",
        ),
        (lambda: get_peft_model(llama(), HiraConfig(rank_pattern={"qproj": 2})), "matches none of the 4 targets"),
    ],
)
def test_what_has_no_effect_or_does_not_fit_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
