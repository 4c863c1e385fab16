"""AdaMSS's own: groups as scikit-learn makes them, the formula, and which groups train when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import AdamssConfig, PeftModel, get_peft_model
from coadapt.core.clusters import groups
from coadapt.core.decompositions import singular_vectors
from laws.setting import close
from models import ids, llama, stir

ASA: dict[str, Any] = {"use_asa": True, "init_warmup": 2, "final_warmup": 7, "mask_interval": 2}


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_are_scikit_learns() -> None:
    """What its KMeans (1.9.1; init="random", n_init=1, max_iter=10, random_state=123456789) says of these rows."""
    torch.manual_seed(0)
    expected = [3, 0, 2, 0, 3, 2, 2, 0, 3, 0, 0, 1, 0, 3, 0, 3, 0, 1, 3, 0, 0, 2, 1, 3]
    assert groups(torch.randn(24, 4), 4).tolist() == expected
    equal_rows = torch.tensor([[0.0, 0.0]] * 4 + [[5.0, 1.0], [9.0, 3.0], [0.0, 0.0]])
    assert groups(equal_rows, 3).tolist() == [0, 0, 0, 0, 2, 1, 0]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_singular_vectors_are_torchs(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape)
    torch.manual_seed(4)
    u, s, v = torch.svd_lowrank(matrix, q=3, niter=2)
    for found, expected in zip(singular_vectors(matrix, 3, 4), (u, s, v.mT), strict=True):
        close(found, expected)


# ---- the formula -----------------------------------------------------------------------------------------------------


def test_each_outputs_change_is_of_its_group() -> None:
    layer = nn.Linear(6, 8)
    view = PeftModel(nn.Sequential(layer), AdamssConfig(r=4, num_subspaces=3, subspace_rank=2, target_modules=["0"]))
    x = torch.randn(5, 6)
    assert torch.equal(view(x), layer(x))
    stir(view.adapters, by=0.5)
    method: Any = view.get_adapter("default").parts[0].method
    expected = layer(x).detach()
    seen = 0
    for k, (rows, rank) in enumerate(method.subspaces()):
        for o in rows.tolist():
            for row in range(5):
                with_one = torch.cat([x[row], torch.ones(1)])
                for j in range(rank):
                    expected[row, o] += (method.B[o, j] * (method.A[k, j] @ (method.V @ with_one))).detach()
            seen += 1
    assert seen == 8
    close(view(x), expected, 1e-5)


def test_without_a_bias_there_is_none() -> None:
    layer = nn.Linear(6, 8, bias=False)
    view = PeftModel(nn.Sequential(layer), AdamssConfig(r=4, target_modules=["0"]))
    stir(view.adapters)
    assert not view(torch.zeros(1, 6)).any()


# ---- which groups train ----------------------------------------------------------------------------------------------


def methods(view: PeftModel) -> list[Any]:
    return [part.method for part in view.get_adapter("default").parts]


def fresh() -> PeftModel:
    config = AdamssConfig(r=8, num_subspaces=3, asa_target_subspaces=4, init_seed=0, task_type="CAUSAL_LM", **ASA)
    return get_peft_model(llama(), config).train()


def training(view: PeftModel) -> int:
    return sum(int(m.importance.get_buffer("trains").sum()) for m in methods(view))


def steps(view: PeftModel, optimizer: torch.optim.Optimizer, numbers: range) -> list[int]:
    found = []
    for step in numbers:
        tokens = ids(4, seed=step)
        view(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(training(view))
    return found


def adam(view: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(view.adapters.parameters(), lr=0.02, weight_decay=0.1)


def values(view: PeftModel) -> list[Tensor]:
    return [p.detach().clone() for p in view.adapters.parameters()]


def test_groups_are_frozen_as_the_schedule_says() -> None:
    """12 groups, 4 at the end: 4 + 8 (1 - (t - 2) / 5)^3 at steps 2, 4, 6, and at 7, which is no multiple of 2."""
    view = fresh()
    assert len(methods(view)) == 4
    found = steps(view, adam(view), range(1, 10))
    assert found == [12, 12, 12, 5, 5, 4, 4, 4, 4]
    assert all(p.requires_grad for p in view.adapters.parameters())


def test_what_is_frozen_stays_to_the_bit_and_the_rest_trains() -> None:
    """With an optimiser that has momentum and decay, which would move it."""
    view = fresh()
    optimizer = adam(view)
    steps(view, optimizer, range(1, 8))
    before = values(view)
    steps(view, optimizer, range(8, 11))
    moved = [int((a != b).flatten(1).any(1).sum()) for a, b in zip(values(view), before, strict=True)]
    expected: list[int] = []
    for method in methods(view):
        trains = method.importance.get_buffer("trains")
        expected += [int(trains.sum()), int(trains[method.base.get_buffer("group")].sum())]
    assert moved == expected
    assert 0 < sum(expected)


def test_saved_and_loaded_in_between(tmp_path: Path) -> None:
    whole, view = fresh(), fresh()
    steps(whole, adam(whole), range(1, 10))
    optimizer = adam(view)
    steps(view, optimizer, range(1, 6))
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    other = adam(again)
    other.load_state_dict(optimizer.state_dict())
    steps(again, other, range(6, 10))
    assert all(map(torch.equal, values(again), values(whole)))
    assert training(again) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_weights": True}, "init_weights=True"),
        ({"use_asa": True, "init_warmup": 5, "final_warmup": 5}, "must come before final_warmup=5"),
        ({"use_asa": True, "asa_target_subspaces": 20}, "asa_target_subspaces=20 is not below the 20 groups of 4"),
        ({"svd_threshold": 1.5}, "svd_threshold"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(), AdamssConfig(**options))
