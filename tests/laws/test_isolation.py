"""Adapters that train in one batch get the gradients that each gets alone; one that no row uses gets none."""

from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from laws.setting import (
    MAKE,
    fits,
    gradients,
    ids,
    logits,
    loss,
    pairs,
    rest,
    same_gradients,
    stir,
    view_on,
)  # fmt: skip


def beside(case: str, model: str) -> str:
    """Another method for the second adapter."""
    return next(c for c in ("prompt", "lora", "bitfit") if c != case and fits(c, model))


def row_losses(view: torch.nn.Module, tokens: torch.Tensor, **options: object) -> torch.Tensor:
    """One loss for each row, summed."""
    out = logits(view, tokens, **options)
    return (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).sum()


@pairs(0)
def test_each_gets_what_it_gets_alone(case: str, model: str) -> None:
    view = view_on(model, case, beside(case, model), case, case)
    if (case, model) == ("prefix-decoupled", "t5"):  # one gate's gradient is a sum that cancels to 0.006
        view.double()
    names, tokens = ["a", "b", "a", "c", None, "a + b"], ids(6)
    row_losses(view, tokens, adapter_names=names).backward()
    together = gradients(view)
    for b, name in enumerate(names):
        if name is not None:
            row_losses(view, tokens[b : b + 1], adapters=name).backward()
    same_gradients(together, gradients(view))
    unused = [n for n in together if n.startswith("adapters.d.")]
    assert unused
    assert all(together[n] is None for n in unused)
    assert any(g is not None and g.abs().max() > 0 for n, g in together.items() if n.startswith("adapters.a."))


@pairs(1)
def test_neighbours_in_the_batch_move_nothing(case: str, model: str) -> None:
    """Whatever the rows of others hold, the gradient of one's own is the same; a rogue among them too."""
    view = view_on(model, case, beside(case, model))
    tokens = ids(4)
    row_losses(view, tokens, adapter_names=["a", "a", "b", "b"]).backward()
    first = {n: g for n, g in gradients(view).items() if n.startswith("adapters.a.")}
    with torch.no_grad():
        for parameter in view.get_adapter("b").parameters():
            parameter.mul_(5)
    tokens[2:] = ids(2, seed=9)
    row_losses(view, tokens, adapter_names=["a", "a", "b", "b"]).backward()
    second = {n: g for n, g in gradients(view).items() if n.startswith("adapters.a.")}
    same_gradients(first, second)


@pairs(2)
def test_accumulated_over_forwards(case: str, model: str) -> None:
    """Two forwards with different adapters before one backward: both get theirs, a third gets none."""
    view = view_on(model, case, beside(case, model), case)
    view.set_adapter("a")
    one = loss(view)
    view.set_adapter("b")
    two = loss(view)
    view.set_adapter("c")
    (one + two).backward()
    together = gradients(view)
    loss(view, adapters="a").backward()
    loss(view, adapters="b").backward()
    same_gradients(together, gradients(view))
    assert all(g is None for n, g in together.items() if n.startswith("adapters.c."))


COMPOSED = ["a + 0.5*b", "2*a >> b", None, "0.25*b + c", "-1*c + (a >> 0.5*b)", "a + a"]


@pairs(3, models=[model for model in MAKE if model != "bart"])
def test_rows_of_several_adapters_with_weights(case: str, model: str) -> None:
    """Each adapter's gradient is the sum of those that the rows alone would give it."""
    if case.startswith(("prompt", "p-tuning")):
        names = ["0.5*a >> b", "a >> b", None, "0.25*b >> c", "c >> 2*a", "b"]  # a sum takes prompts of one length
    elif case.startswith("prefix"):
        names = [n and n.replace("-1*", "") for n in COMPOSED]  # a joint prefix takes no gate below 0
    else:
        names = COMPOSED
    view = view_on(model, case, beside(case, model), case)
    tokens = ids(len(names))
    row_losses(view, tokens, adapter_names=names).backward()
    together = gradients(view)
    for b, node in enumerate(names):
        if node is not None:
            row_losses(view, tokens[b : b + 1], adapters=node).backward()
    same_gradients(together, gradients(view), 3e-5)
    assert all(g is not None and g.abs().max() > 0 for n, g in together.items() if n.endswith("lora.B"))


LONG_AND_SHORT: dict[str, Any] = {
    "a": PromptTuningConfig(num_virtual_tokens=2),
    "b": PromptTuningConfig(num_virtual_tokens=4),
    "c": PrefixTuningConfig(num_virtual_tokens=3),
    "d": PrefixTuningConfig(num_virtual_tokens=1),
    "e": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "f": LoraConfig(r=2),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "bloom", *rest("opt", "qwen3", "gemma2")])
def test_rows_of_unequal_lengths_train_as_they_do_alone(model: str, side: str) -> None:
    """Prompts and prefixes of unequal lengths, before rows that are padded: no gradient comes from padding."""
    view = PeftModel(MAKE[model]())
    for i, (name, config) in enumerate(LONG_AND_SHORT.items()):
        if model != "bloom" or name not in "cd":
            torch.manual_seed(i)
            view.add_adapter(name, config)
            stir(view.get_adapter(name), seed=i)
    names = ["a", "b >> 0.5*e", "c + e", None, "d >> b", "e", "0.5*c + d", "a >> b"]
    names = [n for n in names if model != "bloom" or n is None or not set("cd") & set(n)]
    lengths = [3 + 2 * i % 5 for i in range(len(names))]
    own, width = [ids(1, n, seed=i) for i, n in enumerate(lengths)], max(lengths)
    padded = [(width - n, 0) if side == "left" else (0, width - n) for n in lengths]
    tokens = torch.cat([pad(row, p) for row, p in zip(own, padded, strict=True)])
    mask = torch.cat([pad(torch.ones_like(row), p) for row, p in zip(own, padded, strict=True)])
    more: dict[str, Any] = {"attention_mask": mask}
    if model in ("llama", "gpt2", "qwen3", "gemma2"):
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    decoder = ids(1, 4, seed=90)
    two = model == "t5"
    out = logits(
        view,
        tokens,
        adapter_names=names,
        **more,
        **({"decoder_input_ids": decoder.expand(len(names), -1)} if two else {}),
    )
    weight = torch.linspace(-1, 1, out.shape[-1])
    (out * weight * (1 if two else mask[..., None])).square().sum().backward()
    together = gradients(view)
    for node, row in zip(names, own, strict=True):
        if node is not None:
            found = logits(view, row, adapters=node, **({"decoder_input_ids": decoder} if two else {}))
            (found * weight).square().sum().backward()
    same_gradients(together, gradients(view), 1e-4)
    assert all(g is None for n, g in together.items() if n.startswith("adapters.f."))


@pairs(4)
def test_accumulated_over_micro_batches(case: str, model: str) -> None:
    """Several backwards before one step: who took part in one has that gradient, who took part in none has None."""
    view = view_on(model, case, beside(case, model), case, case)
    for seed, names in enumerate((["a", None], ["b", "a + 0.5*b"], ["b", "c"])):
        row_losses(view, ids(2, seed=seed), adapter_names=names).backward()
    together = gradients(view)
    row_losses(view, ids(2, seed=2)[1:], adapters="c").backward()
    only = {n: g for n, g in gradients(view).items() if n.startswith("adapters.c.")}
    same_gradients({n: g for n, g in together.items() if n.startswith("adapters.c.")}, only)
    assert all((g is None) == n.startswith("adapters.d.") for n, g in together.items())
