"""A base with weights on meta takes adapters, which are on meta where their site is, and gets its weights later."""

from typing import Any

import pytest
import torch

from coadapt import PeftModel
from laws.setting import EVERY, MAKE, close, config_of, logits, pairs, view_on


@pairs(2)
def test_attach_to_meta_then_load(case: str, model: str) -> None:
    """Weights and adapters are loaded after attaching: the same outputs as in the usual order."""
    expected = view_on(model, case)
    with torch.device("meta"):
        empty = MAKE[model]()
    view = PeftModel(empty, config_of(case, model), "a")
    sites = list(view.adapters.parameters())
    assert all(p.is_meta for p in sites)
    base: Any = view.get_base_model()
    loaded = MAKE[model]()
    base.load_state_dict(loaded.state_dict(), assign=True)
    for (name, buffer), (_, real) in zip(base.named_buffers(), loaded.named_buffers(), strict=True):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            setattr(base.get_submodule(owner), last, real)
    view.load_state_dict(expected.state_dict(), assign=True)
    close(logits(view.eval()), logits(expected))


@pairs(3, [case for case in EVERY if case != "lora-tied"])  # the head's alone is tied to nothing
def test_some_weights_on_meta(case: str, model: str) -> None:
    """The rest of the model works on; adapters appear on the device of their site."""
    base: Any = MAKE[model]()
    owner = [m for m in base.modules() if isinstance(m, torch.nn.Linear)][-1]
    owner.weight = torch.nn.Parameter(owner.weight.to("meta"), requires_grad=False)
    view = PeftModel(base, config_of(case, model), "a")
    for part in view.get_adapter("a").parts:
        for parameter in part.method.parameters():
            if part.place.module is owner:
                assert parameter.is_meta
            elif not any(p.is_meta for p in part.place.module.parameters()):
                assert not parameter.is_meta
    assert isinstance(view._record.fingerprint, str)
    view.unload()


@pytest.mark.parametrize("case", ["lora", "bottleneck", "bitfit"])
def test_parameters_appear_in_the_dtype_of_their_site(case: str) -> None:
    base: Any = MAKE["bert"]()
    base.bert.encoder.layer[1].double()
    view = PeftModel(base, config_of(case, "bert"))
    seen = set()
    for part in view.get_adapter("default").parts:
        site = next(part.place.module.parameters()).dtype
        seen.add(site)
        assert {p.dtype for p in part.method.parameters()} == {site}
    assert seen == {torch.float32, torch.float64}
