"""What an adapter costs to attach, load, save and switch to grows with its sites, and with nothing else.

Costs are counted, not timed: Python calls are the same in each run.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from cases import CASES
from coadapt import LoraConfig, PeftModel
from coadapt.core import base as base_module
from coadapt.core import plan as plan_module
from laws.setting import EVERY, config_of, fits, pairs
from models import MODELS, ids, llama, logits, stir

COUNTED = (*CASES, "lora-all-linear", "prefix-projected", "language")


def calls(do: Callable[[], Any]) -> int:
    """How many Python functions are called."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # what it finalises would count
    sys.setprofile(note)
    try:
        do()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def costs(case: str, folder: Path, layers: int, loaded: int) -> dict[str, int]:
    """Calls of each verb, on a model of `layers` layers with `loaded` adapters."""
    config = config_of(case, "llama")
    view = PeftModel(llama(num_hidden_layers=layers), config, "first")
    view.save_pretrained(folder, selected_adapters=["first"])
    for name in range(1, loaded):
        view.add_adapter(f"a{name}", config)

    def plan(*adapters: str) -> None:
        with view.running(None, adapters, (), {}) if len(adapters) > 1 else view.running(adapters[0], None, (), {}):
            pass

    def verbs(name: str) -> dict[str, int]:
        return {
            "add": calls(lambda: view.add_adapter(name, config)),
            "switch": calls(lambda: view.set_adapter(name)),
            "plan": calls(lambda: plan(name)),
            "rows": calls(lambda: plan(name, "first")),
            "load": calls(lambda: view.load_adapter(folder / "first", f"{name}-loaded")),
            "save": calls(lambda: view.save_pretrained(folder, selected_adapters=["first"])),
            "state": calls(lambda: view.get_adapter(name).state_dict()),
            "delete": calls(lambda: view.delete_adapter(name)),
        }

    verbs("warm")  # imports, caches of classes
    return verbs("counted")


def less(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {verb: one[verb] - other[verb] for verb in one}


@pytest.fixture(autouse=True)
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk starts as many threads as are free at the time."""
    monkeypatch.setattr("coadapt.formats.files._to_disk", lambda *files: None)


@pytest.mark.parametrize(
    "case", [c if c in ("lora", "prefix", "prompt") else pytest.param(c, marks=pytest.mark.full) for c in COUNTED]
)
def test_no_more_with_many_loaded_and_linear_in_the_layers(case: str, tmp_path: Path) -> None:
    few, many = costs(case, tmp_path, 2, loaded=1), costs(case, tmp_path, 2, loaded=12)
    assert {verb: n for verb, n in less(many, few).items() if n > 15} == {}  # some for lists of names
    four, eight = costs(case, tmp_path, 4, loaded=1), costs(case, tmp_path, 8, loaded=1)
    step = less(four, few)
    assert {verb: n for verb, n in less(eight, four).items() if n > 2.1 * step[verb] + 15} == {}


# ---- the base is looked at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora-all-linear", "prefix", "prompt", "bottleneck"])
def test_the_base_is_gone_through_a_few_times(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To attach an adapter, and to make its plan: not once for each site, of which there are 28 linear ones."""
    config, base = config_of(case, "llama"), llama(num_hidden_layers=4)
    view = PeftModel(base, config, "first")
    walks: list[int] = []
    walked = type(base).named_modules

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        walks.append(self is base)
        return walked(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", noted)
    view.add_adapter("second", config)
    attaching = sum(walks)
    view(ids(), adapters="second")
    assert 0 < attaching <= 20
    assert sum(walks) == attaching


def test_the_base_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    made = base_module.fingerprint
    monkeypatch.setattr(base_module, "fingerprint", lambda model: hashed.append(made(model)) or hashed[-1])
    view = PeftModel(llama(), LoraConfig(r=2))
    other = PeftModel(view.get_base_model(), LoraConfig(r=2), "other")
    view.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    view.load_adapter(tmp_path / "one", "again")
    view.state_dict()
    assert len(hashed) == 1
    stir(view.get_adapter("default"))
    view.merge_adapter("default")
    assert view._record.fingerprint == hashed[0]
    view.unmerge_adapter()
    assert view._record.fingerprint == hashed[0] == hashed[-1]


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_base_that_changes_is_hashed_again(how: str) -> None:
    view = PeftModel(llama(), LoraConfig(r=2))
    before = view._record.fingerprint
    layer: Any = view.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        if how == "written":
            layer.weight.mul_(2)
        else:
            layer.weight = Parameter(layer.weight * 2)
    after = view._record.fingerprint
    assert (after.split("-")[0], after) == (before.split("-")[0], base_module.fingerprint(view.get_base_model()))
    assert after != before


def storages() -> dict[int, int]:
    """All memory that a tensor holds now: address -> bytes."""
    tensors: list[Tensor] = [o for o in gc.get_objects() if type(o) in (Tensor, Parameter) and o.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pairs(3, CASES, tuple(MODELS))
def test_an_adapter_holds_nothing_but_its_own(case: str, model: str) -> None:
    """What comes with a second adapter is its tensors and, beside them, half a kilobyte of numbers at most."""
    view = PeftModel(MODELS[model](), config_of(case, model))
    before = storages()
    view.add_adapter("second", config_of(case, model))
    gc.collect()
    new = storages()
    adapter = view.get_adapter("second")
    own = {t.untyped_storage().data_ptr() for t in (*adapter.state_dict().values(), *adapter.buffers())}
    assert own & new.keys() == own
    assert sum(size for memory, size in new.items() if memory not in {*before, *own}) < 512


def test_mixed_batches_keep_stacks_for_the_last_one_only() -> None:
    """What is kept for rows holds as much as the adapters that they use; there may be very many mixtures of those."""
    names = [f"a{i}" for i in range(12)]
    view = PeftModel(llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), names[0])
    for name in names[1:]:
        view.add_adapter(name, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    view.freeze()
    view.eval()
    x = ids().repeat(4, 1)[:6]

    def held(*mixtures: list[str]) -> int:
        with torch.no_grad():
            out = [view(x, adapter_names=mixture).logits for mixture in mixtures]
        alone = view(x, adapters=mixtures[-1][0]).logits[0]
        assert torch.allclose(out[-1][0], alone, atol=1e-5)
        del out
        gc.collect()
        return sum(storages().values())

    one = held(names[:6])
    assert held(*(names[i : i + 6] for i in range(6))) <= 1.01 * one
    assert held(names[:6]) <= 1.01 * one


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The adapters of every plan that is made."""
    made: list[list[str]] = []
    begin = plan_module.Plan.__init__

    def noted(self: Any, *args: Any) -> None:
        begin(self, *args)
        made.append(self.used)

    monkeypatch.setattr(plan_module.Plan, "__init__", noted)
    return made


def test_a_plan_is_made_once(planned: list[list[str]]) -> None:
    view = PeftModel(llama(), LoraConfig(r=2), "a")
    view.add_adapter("b", LoraConfig(r=2))
    for name in ("a", "b", "a", "b"):
        view.set_adapter(name)
        view(ids())
    assert planned == [["a"], ["b"]]
    view.add_adapter("c", LoraConfig(r=2))
    view(ids(), adapters="a")
    view.delete_adapter("c")
    view(ids(), adapters="a")
    assert planned == [["a"], ["b"]]


def test_a_compiled_call_looks_at_its_own_adapters_only() -> None:
    """What is made for a call that torch.compile has a graph for: as much with 12 attached as with 2."""

    def cost(loaded: int) -> int:
        view = PeftModel(llama(), LoraConfig(r=2), "a0").eval()
        view.reserve(12, LoraConfig(r=2))
        for name in range(1, loaded):
            view.add_adapter(f"a{name}", LoraConfig(r=2))

        def call() -> None:
            with view.running(None, ["a0", "a1"], (), {}, slots=True):
                pass

        call()
        stir(view.get_adapter("a1"))
        return calls(call)

    assert abs(cost(12) - cost(2)) <= 2


def test_a_name_that_is_given_again_means_the_new_adapter() -> None:
    view = PeftModel(llama(), LoraConfig(r=2), "a")
    before = logits(view)
    view.add_adapter("b", LoraConfig(r=2, init_lora_weights=False))
    one = view(ids(), adapters="b").logits
    view.delete_adapter("b")
    view.add_adapter("b", LoraConfig(r=2))
    assert not torch.equal(one, before)
    assert torch.equal(view(ids(), adapters="b").logits, before)


# ---- files -----------------------------------------------------------------------------------------------------------


@pairs(4, EVERY, tuple(MODELS))
def test_loading_draws_nothing_and_gives_all(case: str, model: str, tmp_path: Path) -> None:
    view = PeftModel(MODELS[model](), config_of(case, model))
    stir(view.get_adapter("default"))
    view.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    other = PeftModel.from_pretrained(view.get_base_model(), tmp_path, is_trainable=True)
    assert torch.equal(torch.get_rng_state(), state)
    saved, loaded = view.get_adapter("default").state_dict(), other.get_adapter("default").state_dict()
    assert saved.keys() == loaded.keys()
    if case == "prompt-cpt":  # the file says where tokens stand, not how far they have moved
        assert all(torch.allclose(saved[key], loaded[key], atol=1e-6) for key in saved)
    else:
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)


@pytest.mark.parametrize("case", [c for c in EVERY if fits(c, "llama")])
def test_a_new_adapter_is_drawn_all_the_same(case: str) -> None:
    """Nothing of how files are loaded reaches adapters that begin."""
    config = replace(config_of(case, "llama"), init_seed=1)
    other = replace(config, init_seed=2)
    one, two = (PeftModel(llama(), c).get_adapter("default").weight for c in (config, other))
    not_drawn = (
        *("bitfit", "prompt-cpt", "full-copy", "ia3", "ln-tuning", "tokens", "bat", "miss-mini"),
        *("lora-pissa", "lora-mica", "dora-pissa", "loftq", "adamss", "adamss-asa", "osf", "supertuning"),
    )
    assert torch.equal(one, two) == (case in not_drawn)


def test_the_seed_decides_in_whatever_order_modules_are_named() -> None:
    one, other = (
        PeftModel(llama(), LoraConfig(r=2, init_seed=3, target_modules=names)).get_adapter("default").state_dict()
        for names in (["q_proj", "v_proj"], ["v_proj", "q_proj"])
    )
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
