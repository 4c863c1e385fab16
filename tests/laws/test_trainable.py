"""Only what is trainable changes; attaching and activating never say what trains."""

from dataclasses import replace

import torch

from coadapt import PeftModel
from laws.setting import MAKE, attach, close, config_of, gradients, logits, loss, pairs, view_on


@pairs(2)
def test_only_what_trains_changes(case: str, model: str) -> None:
    view = view_on(model, case, "lora" if case != "lora" else "bitfit" if model != "llama" else "bottleneck")
    view.freeze("b")
    base = {n: t.clone() for n, t in view.base.state_dict().items()}
    a, b = view.get_adapter("a").weight.detach().clone(), view.get_adapter("b").weight.detach().clone()
    optimizer = torch.optim.AdamW(view.parameters(), lr=0.1, weight_decay=0.1)
    loss(view.train()).backward()  # in training, where a base that counts along would count
    optimizer.step()
    assert all(torch.equal(t, base[n]) for n, t in view.base.state_dict().items())
    assert torch.equal(view.get_adapter("b").weight, b)
    assert not torch.equal(view.get_adapter("a").weight, a)


@pairs(3)
def test_every_parameter_gets_a_gradient(case: str, model: str) -> None:
    view = view_on(model, case)
    loss(view).backward()
    for name, gradient in gradients(view).items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        dead = case in ("bitfit", "lora-bias") and ("key" in name or "k_proj" in name)
        dead = dead or name.endswith("glora.D.X")  # scales a bias, which is 0 in most of these models
        if not dead:  # a bias of the keys moves all scores of a query alike
            assert float(gradient.abs().max()) > 0, name


@pairs(4)
def test_verbs_leave_what_trains_alone(case: str, model: str) -> None:
    view = PeftModel(MAKE[model]())
    view.add_adapter("a", config_of(case, model))
    view.add_adapter("b", replace(config_of(case, model), inference_mode=True))
    for step in (["a", "b"], "b", "a", "a >> b", None):
        view.set_adapter(step)
        assert view.trainable() == ["a"]
    with view.disable_adapter(), view.using("b"):
        assert view.trainable() == ["a"]
    assert view.trainable("b") == ["b"]
    view.unfreeze()
    assert view.trainable() == ["a", "b"]
    view.freeze("a")
    assert view.trainable() == ["b"]


def test_the_base_is_frozen_while_a_view_lasts_and_trains_again_after() -> None:
    for name, make in MAKE.items():
        base = make().requires_grad_(True)
        kept = next(iter(base.parameters()))
        kept.requires_grad_(False)
        before = {n: p.requires_grad for n, p in base.named_parameters()}
        one, two = attach(base, name, "lora"), attach(base, name, "lora")
        assert not any(p.requires_grad for p in base.parameters())
        one.unload()
        assert not any(p.requires_grad for p in base.parameters())
        two.unload()
        assert {n: p.requires_grad for n, p in base.named_parameters()} == before


def test_statistics_of_a_base_are_frozen_while_a_view_lasts_and_count_again_after() -> None:
    """BatchNorm in training would change the base without any gradient."""
    base = MAKE["conv"]().train()
    before = {n: b.clone() for n, b in base.named_buffers()}
    view = attach(base, "conv", "lora")
    for _ in range(2):
        expected = logits(view.eval())
        close(logits(view.train()), expected)
    assert view.training and base.training and not base.norm.training
    assert all(torch.equal(b, before[n]) for n, b in base.named_buffers())
    view.unload()
    assert base.norm.training
    logits(base)
    assert not torch.equal(base.norm.running_mean, before["norm.running_mean"])


def test_statistics_that_rested_before_rest_on() -> None:
    base = MAKE["conv"]().train()
    base.norm.eval()
    attach(base, "conv", "lora").unload()
    assert base.training and not base.norm.training
