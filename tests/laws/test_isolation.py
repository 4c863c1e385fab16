"""Adapters that train in one batch get the gradients that each gets alone; one that no row uses gets none."""

import torch

from laws.setting import fits, gradients, ids, logits, loss, pairs, same_gradients, view_on


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
