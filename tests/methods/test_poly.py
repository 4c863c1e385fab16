"""Skills: a row has its task's mix, in parts too, with beams and flattened tokens; what is drawn while it trains."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import LoraConfig, PeftModel, PolyConfig, get_peft_model
from models import gpt2, ids, llama, logits, stir

THREE: dict[str, Any] = {"r": 2, "n_tasks": 3, "n_skills": 4, "init_weights": False}


def trained(base: Any, **options: Any) -> PeftModel:
    view = get_peft_model(base, PolyConfig(**THREE, **options)).eval()
    stir(view.adapters, by=0.5)
    return view


@pytest.mark.parametrize("splits", [1, 2])
def test_the_papers_sum(splits: int) -> None:
    """Each part of the input meets its own mix of the skills' parts, equation 4 of 2211.03831."""
    layer = nn.Linear(6, 8)
    config = PolyConfig(target_modules=["layer"], n_splits=splits, **THREE)
    view = get_peft_model(nn.ModuleDict({"layer": layer}), config)
    stir(view.adapters, by=0.5)
    method: Any = view.eval().get_adapter("default").parts[0].method
    tasks = torch.tensor([2, 0])
    down, up = method.mixed(tasks)
    for row, task in enumerate(tasks.tolist()):
        z = method.Z[task].view(splits, 4).sigmoid()
        for part in range(splits):
            weights = z[part] / z[part].sum()
            a = sum(weights[s] * method.A[part, s] for s in range(4))
            b = sum(weights[s] * method.B[part, s] for s in range(4))
            torch.testing.assert_close(down[row].chunk(splits)[part], a)
            torch.testing.assert_close(up[row].chunk(splits, dim=1)[part], b)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_row_has_the_mix_of_its_task(make: Any) -> None:
    view = trained(make(), target_modules="all-linear")
    tokens = ids(4)
    together = logits(view, tokens, task_ids=[2, 0, 1, 2])
    for row, task in enumerate([2, 0, 1, 2]):
        alone = logits(view, tokens[row : row + 1], task_ids=[task])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_generation_follows_the_tasks() -> None:
    view = trained(llama())
    tokens, options = ids(2), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    both = view.generate(tokens, attention_mask=mask, task_ids=[2, 1], **options)
    for row, task in enumerate([2, 1]):
        alone = view.generate(tokens[row : row + 1], attention_mask=mask[:1], task_ids=[task], **options)
        assert torch.equal(alone, both[row : row + 1])


def test_while_it_trains_skills_are_drawn() -> None:
    view = trained(llama()).train()
    options = {"task_ids": [0, 0, 0]}
    tokens = ids(1).expand(3, -1)
    torch.manual_seed(0)
    one = logits(view, tokens, **options)
    torch.manual_seed(0)
    assert torch.equal(logits(view, tokens, **options), one)
    assert not torch.equal(logits(view, tokens, **options), one)
    assert not torch.allclose(one[0], one[1], atol=1e-4), "for each row"
    one.square().mean().backward()
    gradients = [part.method.Z.grad for part in view.get_adapter("default").parts]
    assert all(g is not None and bool((g[0] != 0).all()) and not g[1:].any() for g in gradients)


def test_with_one_task_it_is_merged() -> None:
    view = get_peft_model(llama(), PolyConfig(r=2, init_weights=False)).eval()
    stir(view.adapters)
    before: Tensor = logits(view)
    assert torch.equal(before, logits(view, task_ids=[0, 0, 0]))
    view.merge_adapter()
    torch.testing.assert_close(logits(view), before, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    view = trained(llama())
    with pytest.raises(ValueError, match="a weight for each of 3 tasks"):
        view.merge_adapter()
    with pytest.raises(ValueError, match="tells tasks apart"):
        logits(view)
    view.add_adapter("lora", LoraConfig(r=2))
    with pytest.raises(ValueError, match="task_ids has no effect"):
        logits(view, adapters="lora", task_ids=[0, 0, 0])
    with pytest.raises(ValueError, match="n_splits=3 does not divide the 32 inputs"):
        get_peft_model(llama(), PolyConfig(n_splits=3))
    with pytest.raises(ValueError, match="poly_type='mhr' is not one of"):
        PolyConfig(poly_type="mhr")
