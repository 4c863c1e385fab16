"""accelerate prepares a view and its optimiser, and moves its base about."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState

from beside.conftest import Make
from laws.setting import MAKE, attach, close, gradients, ids, logits, loss, rest, same_gradients
from steps import flat


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """accelerate keeps one state for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_view_trains_as_it_does_alone(precision: str) -> None:
    def trained(prepare: bool) -> torch.Tensor:
        view: Any = attach(MAKE["llama"](), "llama", "lora", "prompt", "bottleneck").train()
        optimizer = torch.optim.AdamW(view.param_groups({"a": 1e-2, "b": 1e-2, "c": 1e-2}))
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model, steps = accelerator.prepare(view, optimizer) if prepare else (view, optimizer)
        for seed in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and not prepare):
                value = loss(model, ids(seed=seed))
            accelerator.backward(value) if prepare else value.backward()
            steps.step()
            steps.zero_grad()
        assert accelerator.unwrap_model(model) is view
        return flat(view.adapters.parameters())

    start = flat(attach(MAKE["llama"](), "llama", "lora", "prompt", "bottleneck").adapters.parameters())
    alone = trained(False)
    assert torch.equal(trained(True), alone)
    assert float((alone - start).abs().max()) > 1e-3


def test_accumulation_under_accelerate_is_one_large_batch() -> None:
    view: Any = attach(MAKE["gpt2"](), "gpt2", "lora", "prefix").train()
    loss(view, ids(4)).backward()
    whole = gradients(view)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(view, torch.optim.SGD(view.param_groups({"a": 0.0, "b": 0.0})))
    for half in ids(4).split(2):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, half))
            optimizer.step()
    same_gradients(gradients(view), whole)


def test_state_is_saved_and_loaded_by_accelerate(tmp_path: Any) -> None:
    view: Any = attach(MAKE["llama"](), "llama", "lora", "prompt")
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(view)
    before = logits(model)
    accelerator.save_state(str(tmp_path))
    size = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert size < sum(p.numel() * p.element_size() for p in view.base.parameters())
    with torch.no_grad():
        for parameter in view.adapters.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize(
    "model", ["llama", *rest("gpt2", "t5", "bert", "opt", "bart", "whisper", "vit", "gemma3", "mixtral")]
)
def test_a_base_that_is_offloaded_to_the_cpu(model: str, attach_first: bool) -> None:
    """cpu_offload before or after attaching; then the adapters go, the hooks go, and the base is as it was."""
    cases = ("lora", "prefix", "bottleneck")
    expected, plain = attach(MAKE[model](), model, *cases), logits(MAKE[model]())
    loss(expected).backward()
    base: Any = MAKE[model]()
    classes = [type(m) for m in base.modules()]
    view = attach(base, model, *cases) if attach_first else None
    cpu_offload(base, execution_device=torch.device("cpu"))
    view = view or attach(base, model, *cases)
    view.load_state_dict(expected.state_dict())
    close(logits(view), logits(expected))
    loss(view).backward()
    same_gradients(gradients(view), gradients(expected))
    assert torch.equal(logits(base), plain)
    view.unload()
    assert torch.equal(logits(base), plain)
    remove_hook_from_submodules(base)
    assert [type(m) for m in base.modules()] == classes


def test_a_dispatched_view(view_of: Make) -> None:
    """The view itself can be dispatched: its adapters go where the map says."""
    view: Any = view_of("lora", "prompt")
    expected = logits(view_of("lora", "prompt"))
    made: Any = dispatch_model(view, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    close(logits(made), expected)
    assert made.unload() is view.base
