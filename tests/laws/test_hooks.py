"""accelerate's hooks come and go, before the adapters or after them, and neither disturbs the other."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    ModelHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from safetensors.torch import load_file
from torch import nn

from coadapt import LoraConfig, PeftModel, PooledRouter, Sum, TokenRouter
from laws.setting import MAKE, attach, close, fits, gradients, logits, loss, pairs, rest, same_gradients
from models import FAMILIES


class Count(ModelHook):
    """Counts the forwards of its module."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls += 1
        return args, kwargs


def linears(base: nn.Module) -> list[nn.Module]:
    return [m for m in base.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def classes(base: nn.Module) -> list[type]:
    return [type(m) for m in base.modules()]


ORDERS = [
    order
    for order in itertools.permutations(["hook", "attach", "unhook", "detach"])
    if order.index("hook") < order.index("unhook") and order.index("attach") < order.index("detach")
]


def _orders() -> Any:
    """Two orders for each method in the default run, all of them for every pair in the full one."""
    found: list[Any] = []
    for i, pair in enumerate(pairs(0).args[1]):
        for j, order in enumerate(ORDERS):
            marks = pair.marks or (() if (i + j) % 3 == 0 else pytest.mark.full)
            found.append(pytest.param(*pair.values, order, marks=marks, id="-".join([*pair.values, *order])))
    return pytest.mark.parametrize(("case", "model", "order"), found)


@_orders()
def test_hooks_and_adapters_in_any_order(case: str, model: str, order: tuple[str, ...]) -> None:
    base = MAKE[model]()
    before, plain = classes(base), logits(base)
    adapted = logits(attach(MAKE[model](), model, case))
    hooks: list[Count] = []
    view: Any = None
    for step in order:
        match step:
            case "hook":
                for module in linears(base):
                    hooks.append(Count())
                    add_hook_to_module(module, hooks[-1])
            case "unhook":
                for module in linears(base):
                    remove_hook_from_module(module)
                hooks = []
            case "attach":
                view = attach(base, model, case)
            case _:
                view.unload()
                view = None
        calls = sum(h.calls for h in hooks)
        assert torch.equal(logits(base), plain)
        if view is not None:
            close(logits(view), adapted)
        if hooks:
            assert sum(h.calls for h in hooks) > calls, "the hooks run"
    assert classes(base) == before
    for module in base.modules():
        assert "_hf_hook" not in vars(module)
        kept: Any = module.forward  # accelerate leaves a bound one behind: it must be the class's own
        assert kept.__func__ is type(module).forward


@pytest.mark.parametrize("attach_first", [True, False])
@pairs(1)
def test_offloaded_weights(case: str, model: str, attach_first: bool) -> None:
    """Weights that lie elsewhere, and are put on the device for each call (here: from the CPU to the CPU)."""
    expected = attach(MAKE[model](), model, case)
    loss(expected).backward()
    base = MAKE[model]()
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    view = attach(base, model, case) if attach_first else None
    attach_align_device_hook(base, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    assert any(p.is_meta for p in base.parameters())
    view = view or attach(base, model, case)
    view.load_state_dict(
        expected.state_dict()
    )  # a start that is drawn with the spread of weights that are away differs
    close(logits(view), logits(expected))
    assert any(p.is_meta for p in base.parameters()), "weights go back after the call"
    loss(view).backward()
    same_gradients(gradients(view), gradients(expected))
    plain = logits(MAKE[model]())
    assert torch.equal(logits(base), plain)
    view.unload()
    assert torch.equal(logits(base), plain)
    remove_hook_from_submodules(base)


@pytest.mark.parametrize("router", [TokenRouter, PooledRouter])
def test_routers_over_offloaded_weights(router: Any) -> None:
    """Their parameters lie where the adapters' do, which is where the layers compute."""

    def routed(base: nn.Module) -> Any:
        view = attach(base, "gpt2", "lora", "prefix", "lora")
        view.set_adapter(Sum("a", "b", "c", weights=router(activation="sigmoid")))
        return view

    expected = routed(MAKE["gpt2"]())
    base = MAKE["gpt2"]()
    cpu_offload(base, torch.device("cpu"))
    view = routed(base)
    assert all(p.is_meta for p in base.parameters())
    view.load_state_dict(expected.state_dict())
    close(logits(view), logits(expected))
    remove_hook_from_submodules(base)


def away(base: nn.Module, folder: Path | None) -> None:
    """Has accelerate keep the weights on the CPU, or in files; after a first call no two parameters are one object."""
    if folder is None:
        cpu_offload(base, torch.device("cpu"))
    else:
        disk_offload(base, str(folder), torch.device("cpu"))
    logits(base)
    assert all(p.is_meta for p in base.parameters())


def sites(view: Any) -> list[str]:
    return [part.place.path for part in view.get_adapter("a").parts]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("model", ["t5", "gpt2", *rest("llama", "bart", "whisper", "bert")])
def test_ties_are_seen_where_weights_are_away(model: str, on_disk: bool, tmp_path: Path) -> None:
    """Trained tokens sit at every layer with that weight, once each; files are those of a base that is in memory."""
    tied = {"tie_word_embeddings": True} if model == "llama" else {}
    expected, base = attach(MAKE[model](**tied), model, "tokens"), MAKE[model](**tied)
    away(base, tmp_path / "weights" if on_disk else None)
    view = attach(base, model, "tokens")
    assert sites(view) == sites(expected)
    assert len(sites(view)) == {"t5": 3, "bart": 3, "bert": 1}.get(model, 2)
    assert len(list(view.adapters.parameters())) == 1
    close(logits(view), logits(expected))
    view.save_pretrained(tmp_path / "one", save_embedding_layers=True)
    expected.save_pretrained(tmp_path / "two", save_embedding_layers=True)
    one, two = (load_file(tmp_path / name / "a/adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    again = PeftModel.from_pretrained(MAKE[model](**tied), tmp_path / "one")  # which would warn of another base
    close(logits(again), logits(expected))
    if model == "t5":
        with pytest.raises(ValueError, match="it only holds the weight of encoder"):
            PeftModel(base, LoraConfig(target_modules=["shared"]))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("model", ["t5", "gpt2"])
def test_a_head_that_was_untied_is_none_of_the_ties(model: str, on_disk: bool, tmp_path: Path) -> None:
    """Whatever the configuration goes on saying: the values that wait differ."""
    base = MAKE[model]()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight * 2, requires_grad=False)
    assert base.config.tie_word_embeddings
    before = sites(attach(base, model, "tokens"))
    assert "lm_head" not in before
    away(base, tmp_path if on_disk else None)
    assert sites(attach(base, model, "tokens")) == before


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bloom", "t5", "bert", *rest(*FAMILIES)])
def test_dispatched(model: str, attach_first: bool) -> None:
    base = MAKE[model]()
    kinds = [case for case in ("lora", "bottleneck", "prompt", "prefix") if fits(case, model)]
    view = attach(base, model, *kinds) if attach_first else None
    dispatched: Any = dispatch_model(base, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    view = view or attach(dispatched, model, *kinds)
    expected = attach(MAKE[model](), model, *kinds)
    close(logits(view), logits(expected))
    assert torch.equal(logits(view.base), logits(MAKE[model]()))
    names = ["a", "b", "c"]
    close(logits(view, adapter_names=names), logits(expected, adapter_names=names))
