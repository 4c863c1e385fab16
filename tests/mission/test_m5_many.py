"""M5: several LoRAs trained together, with the article's own lines."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, Sum, get_peft_model
from models import bert, gpt2, ids, llama, logits, stir, t5
from steps import alone, checkpointing, error, gradients, loss

CONFIG1 = LoraConfig(r=4, init_lora_weights=False, adapter_name="adapter1")
CONFIG2 = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, adapter_name="adapter2")


def two(make: Any = llama) -> PeftModel:
    model = get_peft_model(make(), CONFIG1)
    model.add_adapter(adapter_name="adapter2", peft_config=CONFIG2)
    return model.train()


def loss_fct(found: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten())


def test_m5_the_articles_lines() -> None:
    base_model, input_ids, labels = llama(), ids(), ids(seed=1)
    config1 = LoraConfig(r=4, init_lora_weights=False, adapter_name="adapter1")
    config2 = LoraConfig(r=4, init_lora_weights=False, adapter_name="adapter2")
    model = get_peft_model(base_model, config1)
    model.add_adapter(adapter_name="adapter2", peft_config=config2)

    # parallel
    model.base_model.set_adapter(["adapter1", "adapter2"])
    loss = loss_fct(model(input_ids).logits, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [model.get_adapter(n).weight.clone() for n in ("adapter1", "adapter2")]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all(
        error(model.get_adapter(n).weight, b) > 1e-3 for n, b in zip(("adapter1", "adapter2"), before, strict=True)
    )
    assert loss_fct(model(input_ids).logits, labels) < loss

    # serial
    model.set_adapter("adapter1"); logits1 = model(input_ids).logits  # fmt: skip  # noqa: E702
    model.set_adapter("adapter2"); logits2 = model(input_ids).logits  # fmt: skip  # noqa: E702
    loss = loss_fct(logits1 + logits2, labels)
    loss.backward()
    assert gradients(model, "adapter1").norm() > 0
    assert gradients(model, "adapter2").norm() > 0

    print(torch.norm(model.get_adapter("adapter1").weight))
    norm = torch.stack([p.square().sum() for p in model.get_adapter("adapter1").parameters()]).sum().sqrt()
    assert error(torch.norm(model.get_adapter("adapter1").weight), norm) < 1e-6
    model1 = get_peft_model(base_model, config1); model2 = get_peft_model(base_model, config2)  # fmt: skip  # noqa: E702
    assert model1.get_base_model() is model2.get_base_model() is base_model
    assert [m.active_adapters for m in (model1, model2)] == [["adapter1"], ["adapter2"]]
    expected = [logits(alone(llama, m, n)) for m, n in ((model1, "adapter1"), (model2, "adapter2"))]
    assert torch.equal(logits(model1), expected[0])
    assert torch.equal(logits(model2), expected[1])
    assert error(expected[0], expected[1]) > 1e-3


def changed(base: Any, view: PeftModel, weights: dict[str, float]) -> Any:
    """`base` with the weighted changes of LoRAs written into its weights by hand."""
    with torch.no_grad():
        for name, weight in weights.items():
            for part in view.get_adapter(name).parts:
                lora: Any = part.method
                change = weight * lora.scale * lora.B @ lora.A
                stored = base.get_submodule(part.place.path).weight
                stored += change if stored.shape == change.shape and type(base) is not type(gpt2()) else change.T
    return base


@pytest.mark.parametrize("make", [llama, gpt2, t5, bert])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, -2.0], [1.0, 0.5, 0.0, -1.0, 2.0]])
def test_m5_1_parallel_is_the_exact_sum(make: Any, weights: list[float]) -> None:
    view = get_peft_model(make(), CONFIG1)
    for i in range(2, len(weights) + 1):
        view.add_adapter(f"adapter{i}", LoraConfig(r=2 * i, target_modules="all-linear", init_lora_weights=False))
    given = {f"adapter{i + 1}": weight for i, weight in enumerate(weights)}
    expected = logits(changed(make(), view, given))
    assert error(logits(view, adapters=Sum(*given, weights=weights)), expected) < 1e-5
    text = " + ".join(f"{w}*{n}" for n, w in given.items() if w >= 0)
    assert (
        error(logits(view, adapters=text), logits(changed(make(), view, {n: max(w, 0) for n, w in given.items()})))
        < 1e-5
    )
    if set(weights) == {1.0}:
        assert error(logits(view, adapters=list(given)), expected) < 1e-5


def serial(model: PeftModel, order: list[str]) -> dict[str, Tensor]:
    """One forward for each name in turn, one loss over the sum of the logits, one backward."""
    model.zero_grad()
    found = []
    for name in order:
        model.set_adapter(name)
        found.append(logits(model))
    torch.stack(found).sum(0).square().mean().backward()
    return {name: gradients(model, name) for name in set(order)}


@pytest.mark.parametrize("kind", ["plain", "reentrant", "not-reentrant"])
@pytest.mark.parametrize("make", [llama, gpt2, t5, bert])
def test_m5_2_serial_gradients_are_exact_in_any_order(make: Any, kind: str) -> None:
    """Against two views with one adapter each, on bases of their own."""
    model = two(make)
    if kind != "plain":
        checkpointing(model, use_reentrant=kind == "reentrant")
    for order in (["adapter1", "adapter2"], ["adapter2", "adapter1"], ["adapter1", "adapter2", "adapter1"]):
        found = serial(model, order)
        for name in found:
            own = alone(make, model, name)
            total = sum(logits(own) if n == name else logits(alone(make, model, n)).detach() for n in order)
            assert isinstance(total, Tensor)
            total.square().mean().backward()
            assert error(found[name], gradients(own, name)) < 1e-5, (order, name)


def test_m5_4_different_rates() -> None:
    """`param_groups` gives each adapter its options, and refuses a name that nobody has or that does not train."""
    model = two()
    model.set_adapter(["adapter1", "adapter2"])
    groups = model.param_groups({"adapter1": 1e-2, "adapter2": {"lr": 1e-3, "weight_decay": 0.0}})
    assert [(g["name"], g["lr"], g.get("weight_decay")) for g in groups] == [
        ("adapter1", 1e-2, None),
        ("adapter2", 1e-3, 0.0),
    ]
    assert [len(g["params"]) for g in groups] == [
        len(list(model.get_adapter(n).parameters())) for n in ("adapter1", "adapter2")
    ]
    loss(model).backward()
    before = {n: model.get_adapter(n).weight.clone() for n in ("adapter1", "adapter2")}
    torch.optim.SGD(groups, lr=1.0).step()
    for name, rate in (("adapter1", 1e-2), ("adapter2", 1e-3)):
        assert error(before[name] - model.get_adapter(name).weight, rate * gradients(model, name)) < 2e-2
    again = model.param_groups({"adapter1": {"weight_decay": 0.1}})  # says nothing of rates, which are remembered
    assert [(g["lr"], g.get("weight_decay")) for g in again] == [(1e-2, 0.1), (1e-3, None)]
    with pytest.raises(ValueError, match=r"'adapter3'.*'adapter"):
        model.param_groups({"adapter3": 1e-2})
    model.freeze("adapter2")
    assert [g["name"] for g in model.param_groups({"adapter1": 1e-2})] == ["adapter1"]
    with pytest.raises(ValueError, match="'adapter2' has nothing that trains"):
        model.param_groups({"adapter2": 1e-2})


COMPOSITIONS = [
    "adapter1 + 0.5*adapter2",
    "prompt >> adapter1",
    "prefix + adapter2",
    "(adapter1 >> adapter2) + prompt",
    "prefix >> prompt",
]


def many() -> PeftModel:
    model = two()
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=3))
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3))
    stir(model.adapters)
    return model


def all_gradients(model: PeftModel, composition: str, tokens: Tensor | None = None, parts: int = 1) -> Tensor:
    """Of the adapters in a composition, gathered over `parts` smaller batches."""
    model.zero_grad()
    model.set_adapter(composition)
    tokens = ids(4) if tokens is None else tokens
    for piece in tokens.chunk(parts):
        (logits(model, piece).float().square().mean() / parts).backward()
    return torch.cat([gradients(model, name) for name in model.active_adapters])


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_m5_5_less_memory_same_gradients(composition: str) -> None:
    """Checkpointing of both kinds, smaller batches, and mixed precision, with any composition."""
    model = many()
    expected = all_gradients(model, composition)
    assert error(all_gradients(model, composition, parts=4), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert error(all_gradients(model, composition), expected) < 0.05
    for reentrant in (True, False):
        again = many()
        again.adapters.load_state_dict(model.adapters.state_dict())
        checkpointing(again, use_reentrant=reentrant)
        assert error(all_gradients(again, composition), expected) < 1e-6
