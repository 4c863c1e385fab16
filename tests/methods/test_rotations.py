"""OFT, BOFT, HRA, RoAd and PSOFT against their papers' own slow ways, and what is promised of them: they rotate."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coadapt import (
    BOFTConfig,
    HRAConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PsoftConfig,
    RoadConfig,
    get_peft_model,
)
from coadapt.config import PeftConfig
from laws.setting import close, far
from models import Holder, conv, ids, llama, logits, stir


def method_at(layer: nn.Module, config: PeftConfig) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    view = PeftModel(Holder(layer), config)
    stir(view.adapters, by=0.3)
    return view, view.get_adapter("default").parts[0].method


def rotating(layer: nn.Module, config: PeftConfig) -> tuple[PeftModel, Any]:
    """`method_at`, without what BOFT scales besides."""
    view, method = method_at(layer, config)
    if hasattr(method, "s"):
        nn.init.ones_(method.s)
    return view, method


ROTATIONS: dict[str, PeftConfig] = {
    "oft": OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["layer"]),
    "oft-shared": OFTConfig(oft_block_size=3, block_share=True, use_cayley_neumann=False, target_modules=["layer"]),
    "boft": BOFTConfig(boft_block_size=4, target_modules=["layer"]),
    "boft-butterfly": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["layer"]),
    "hra": HRAConfig(r=5, target_modules=["layer"]),
    "hra-orthogonal": HRAConfig(r=4, apply_GS=True, target_modules=["layer"]),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_it_is_a_rotation(name: str) -> None:
    """W' of the identity is R^T itself, and R R^T = I."""
    _, method = rotating(nn.Linear(24, 24, bias=False), ROTATIONS[name])
    with torch.no_grad():
        matrix = method.merge(torch.eye(24))
    far(matrix, torch.eye(24))
    close(matrix @ matrix.mT, torch.eye(24))


@pytest.mark.parametrize("name", ROTATIONS)
def test_angles_between_neurons_stay(name: str) -> None:
    layer = nn.Linear(24, 7)
    _, method = rotating(layer, ROTATIONS[name])
    with torch.no_grad():
        changed = method.merge(layer.weight)
    far(changed, layer.weight)
    close(changed @ changed.mT, layer.weight @ layer.weight.mT, 1e-5)


def test_the_series_comes_near_the_inverse() -> None:
    exact = method_at(nn.Linear(12, 5), OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["layer"]))
    errors = []
    for terms in (2, 3, 5, 12):
        config = OFTConfig(oft_block_size=4, num_cayley_neumann_terms=terms, target_modules=["layer"])
        _, method = method_at(nn.Linear(12, 5), config)
        with torch.no_grad():
            method.Q.mul_(0.3)
            exact[1].Q.copy_(-method.Q)  # the two conventions
            errors.append(float((method.merge(torch.eye(12)) - exact[1].merge(torch.eye(12))).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-5


def test_householder_reflections_one_by_one() -> None:
    layer = nn.Conv2d(3, 4, 2)
    _, method = method_at(layer, HRAConfig(r=4, target_modules=["layer"]))
    expected = layer.weight.detach().flatten(1)
    for u in method.U.detach().mT:
        expected = expected @ (torch.eye(12) - 2 * torch.outer(u, u) / (u @ u))
    close(method.merge(layer.weight).detach(), expected.view(4, 3, 2, 2))


@pytest.mark.parametrize("r", [2, 8])
def test_pairs_of_reflections_start_as_nothing(r: int) -> None:
    base = llama()
    close(logits(PeftModel(base, HRAConfig(r=r))), logits(base))


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterflies_by_matrices(factors: int) -> None:
    """Equation by equation: blocks of two halves each, of which those that are 2^(i - 1) apart come together."""
    layer, size = nn.Linear(32, 5), 4
    config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["layer"])
    _, method = method_at(layer, config)
    rotation = torch.eye(32)
    for i in range(factors):
        blocks = []
        for a in method.A[i].detach():
            q = (a - a.mT) / 2
            blocks.append((torch.eye(size) - q) @ (torch.eye(size) + q).inverse())
        order: list[int] = []
        for start in range(0, 32, size * 2**i):
            halves = [list(range(start + h, start + h + size // 2)) for h in range(0, size * 2**i, size // 2)]
            order += [f for half in (*halves[::2], *halves[1::2]) for f in half]
        permuted = torch.eye(32)[order]  # row j picks feature order[j]
        rotation = permuted @ torch.block_diag(*blocks) @ permuted.mT @ rotation
    expected = method.s.detach()[:, None] * (layer.weight.detach() @ rotation.mT)
    close(method.merge(layer.weight).detach(), expected)


def test_butterflies_let_blocks_see_others() -> None:
    """With m rotations, a feature depends on 2^(m - 1) blocks."""
    for factors in (1, 2, 3):
        config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["layer"])
        _, method = method_at(nn.Linear(32, 5), config)
        with torch.no_grad():
            matrix = method.rotated(torch.eye(32), method.made())
        assert int((matrix[0].abs() > 1e-7).sum()) == 4 * 2 ** (factors - 1)


def test_a_butterfly_drops_blocks_of_one_rotation() -> None:
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, boft_dropout=0.6, target_modules=["layer"])
    _, method = method_at(nn.Linear(32, 5), config)
    made = method.train().made().detach()
    seen = set()
    for _ in range(30):
        left = (method.in_call(made) == 0).all(-1).all(-1)  # (m, b)
        assert int(left.any(1).sum()) <= 1
        seen.add(int(left.any(1).long().argmax()) if left.any() else -1)
    assert {0, 1} <= seen
    assert torch.equal(method.eval().in_call(made), made)


@pytest.mark.parametrize("series", [False, True])
def test_the_principal_subspace_is_rotated_and_nothing_else(series: bool) -> None:
    """Without scales: the singular values stay, and so does what is orthogonal to the subspace."""
    layer = nn.Linear(10, 8)
    config = PsoftConfig(
        r=3, psoft_mag_a=False, psoft_mag_b=False, use_cayley_neumann=series, target_modules=["layer"],
        **({"num_cayley_neumann_terms": 20, "cayley_neumann_eps": 0.4} if series else {}),
    )  # fmt: skip
    _, method = method_at(layer, config)
    with torch.no_grad():
        changed = method.merge(layer.weight)
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    far(changed, layer.weight)
    close(changed @ vh[3:].mT, layer.weight.detach() @ vh[3:].mT, 1e-5)
    inner = u[:, :3].mT @ changed @ vh[:3].mT / s[:3, None]  # the rotation, from the outputs' side
    close(inner @ inner.mT, torch.eye(3), 1e-4)


def test_subspaces_are_found_again_and_are_not_in_files(tmp_path: Any) -> None:
    for how in ("full", "lowrank"):
        view = get_peft_model(llama(), PsoftConfig(r=4, psoft_svd=how, random_seed=int(how == "lowrank")))
        stir(view.adapters)
        view.save_pretrained(tmp_path / how)
        state = torch.get_rng_state()
        again = PeftModel.from_pretrained(llama(), tmp_path / how)
        assert torch.equal(torch.get_rng_state(), state)
        close(logits(again), logits(view.eval()))
        assert not [k for k in load_file(tmp_path / how / "adapter_model.safetensors") if "0" in k.rpartition(".")[2]]


def test_pairs_of_features_turn_by_an_angle() -> None:
    layer = nn.Linear(6, 4)
    _, method = method_at(layer, RoadConfig(group_size=4, target_modules=["layer"]))
    theta, alpha = method.theta.detach(), method.alpha.detach()
    rotation = torch.zeros(4, 4)
    for i in range(2):
        turn = torch.tensor([[theta[i].cos(), -theta[i].sin()], [theta[i].sin(), theta[i].cos()]])
        rotation[i::2, i::2] = alpha[i] * turn  # feature i and feature i + 2
    close(method.merge(layer.weight).detach(), rotation @ layer.weight.detach())
    close(method.merge_bias(layer.bias).detach(), rotation @ layer.bias.detach())


def test_on_top_of_a_lora_the_changed_weight_is_rotated() -> None:
    view = get_peft_model(llama(), LoraConfig(init_lora_weights=False), adapter_name="lora")
    view.add_adapter("oft", OFTConfig(oft_block_size=8, init_weights=False))
    stacked = logits(view, adapters="lora >> oft").detach()
    far(stacked, logits(view, adapters="lora + oft"))
    trained = view.get_adapter("oft").state_dict()
    by_hand = get_peft_model(view.merge_and_unload(adapter_names=["lora"]), OFTConfig(oft_block_size=8))
    by_hand.get_adapter("default").load_state_dict(trained)
    close(logits(by_hand), stacked, 1e-5)


def test_dropout_leaves_blocks_as_they_are() -> None:
    view, method = method_at(
        nn.Linear(12, 12), OFTConfig(oft_block_size=3, module_dropout=0.5, target_modules=["layer"])
    )
    x = torch.randn(5, 12)
    whole = (view.eval()(x) - view.base.layer.bias) @ view.base.layer.weight.mT.inverse()
    seen = set()
    for _ in range(20):
        turned = (view.train()(x) - view.base.layer.bias) @ view.base.layer.weight.mT.inverse()
        for i in range(0, 12, 3):
            part = turned[:, i : i + 3]
            left = torch.allclose(part, x[:, i : i + 3], atol=1e-4)
            assert left or torch.allclose(part, whole[:, i : i + 3], atol=1e-4)
            seen.add(left)
    assert seen == {True, False}
    assert torch.equal(method.train().merge(view.base.layer.weight), method.eval().merge(view.base.layer.weight))


def test_the_constrained_form_stays_within_its_bound() -> None:
    view = get_peft_model(llama(), OFTConfig(oft_block_size=8, coft=True, eps=0.01)).train()
    optimizer = torch.optim.SGD(view.parameters(), lr=10.0)
    for _ in range(3):
        view(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in view.get_adapter("default").parts:
        method: Any = part.method
        norms = 2**0.5 * method.Q.detach().norm(dim=1)  # of the matrices
        assert float(norms.max()) <= 0.01 / 4**0.5 * 1.001
        assert float(norms.max()) > 0.001


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: get_peft_model(llama(), OFTConfig(oft_block_size=5)),
            "oft_block_size=5 does not divide the 32 features",
        ),
        (lambda: get_peft_model(llama(), HRAConfig(r=40)), "r=40 is more than the 32 features"),
        (lambda: get_peft_model(conv(), RoadConfig(target_modules=["first"])), "group_size=64 does not divide the 8"),
        (lambda: get_peft_model(llama(), PsoftConfig(r=40, target_modules=["q_proj"])), "more than the 32 directions"),
        (lambda: get_peft_model(llama(), BOFTConfig(boft_block_size=16, boft_n_butterfly_factor=3)), "multiple"),
        (lambda: PsoftConfig(cayley_neumann_eps=0.5), "cayley_neumann_eps=0.5 has no effect"),
        (lambda: BOFTConfig(boft_block_num=4), "give one of them"),
        (lambda: RoadConfig(group_size=3), "must be even"),
        (lambda: OFTConfig(r=4), "give one of them"),
        (lambda: OFTConfig(block_share=True, module_dropout=0.1), "there is only one"),
        (lambda: OFTConfig(eps=0.1), "eps has no effect without coft=True"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
