"""Wrong names, compositions and merges: one clear error each, and the view as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import CASES
from coadapt import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    Seq,
    Sum,
    get_peft_model,
)
from models import ids, llama, logits
from steps import traces


@pytest.mark.parametrize(
    "name",
    [
        "",
        "learned",
        "nothing",
        "gates",
        "__base__",
        "a[1]",
        "a,b",
        "a=b",
        "1e5",
        "a(b",
        ">>",
        "a/b",
        "..",
        ".hidden",
        "a b",
        "a+b",
        "a>>b",
        "0.5",
        "-x",
        "a\\b",
        "a*b",
        "c:d",
        "x" * 200,
        "a\n",
        3,
    ],
)
def test_names_that_are_no_file_names(name: Any) -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="there")
    before = sorted(view.state_dict())
    for call in (lambda: view.add_adapter(name, CASES["lora"]), lambda: LoraConfig(adapter_name=name)):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert "name" in str(caught.value)
    assert sorted(view.state_dict()) == before


def test_names_that_exist_or_contradict(tmp_path: Path) -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="there")
    weight = view.get_adapter("there").weight
    view.save_pretrained(tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: view.add_adapter("there", CASES["prompt"]),
        lambda: get_peft_model(view, CASES["prompt"], adapter_name="there"),
        lambda: view.load_adapter(tmp_path / "there", "there"),
        lambda: PeftModel.from_pretrained(view, tmp_path),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="There is an adapter 'there' already"):
            call()
    with pytest.raises(ValueError, match=r"'one'.*'two'"):
        get_peft_model(view, LoraConfig(adapter_name="one"), adapter_name="two")
    assert list(view.peft_config) == ["there"]
    assert torch.equal(view.get_adapter("there").weight, weight)


UNKNOWN: dict[str, Callable[[PeftModel], Any]] = {
    "set_adapter": lambda v: v.set_adapter("tusk"),
    "a list": lambda v: v.set_adapter(["task", "tusk"]),
    "a text": lambda v: v.set_adapter("task + 0.5*tusk"),
    "Seq": lambda v: v.set_adapter(Seq("task", "tusk")),
    "Sum": lambda v: v.set_adapter(Sum("tusk", weights=[0.5])),
    "using": lambda v: v.using("tusk").__enter__(),
    "adapters": lambda v: logits(v, adapters="tusk"),
    "adapter_names": lambda v: logits(v, adapter_names=["task", "tusk", "task"]),
    "generate": lambda v: v.generate(ids(2), adapters="tusk"),
    "get_adapter": lambda v: v.get_adapter("tusk"),
    "delete_adapter": lambda v: v.delete_adapter("tusk"),
    "freeze": lambda v: v.freeze("tusk"),
    "unfreeze": lambda v: v.unfreeze("tusk"),
    "trainable": lambda v: v.trainable("task", "tusk"),
    "param_groups": lambda v: v.param_groups({"tusk": 0.1}),
    "merge_adapter": lambda v: v.merge_adapter(["tusk"]),
    "save_pretrained": lambda v: v.save_pretrained("/nowhere", selected_adapters=["tusk"]),
    "init_from": lambda v: v.add_adapter("new", LoraConfig(r=4, init_from="tusk")),
}


@pytest.mark.parametrize("which", UNKNOWN)
def test_unknown_names(which: str) -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    view.add_adapter("style", CASES["lora"])
    before = (traces(view), repr(view.composition), view.trainable())
    with pytest.raises(ValueError, match=r"'tusk'.*Did you mean 'task'"):
        UNKNOWN[which](view)
    assert (traces(view), repr(view.composition), view.trainable()) == before


@pytest.mark.parametrize(
    "text, part",
    [
        ("task +", "+"),
        ("task >> ", "end"),
        ("(task", "end"),
        ("task)", "')'"),
        ("x*task", "number"),
        ("", "empty"),
        ("task style", "'style'"),
        ("* task", "'*'"),
    ],
)
def test_texts_that_are_no_composition(text: str, part: str) -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    with pytest.raises(ValueError) as caught:
        view.set_adapter(text)
    assert part in str(caught.value).lower()
    assert view.active_adapters == ["task"]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, "x"], [1.0, torch.ones(2, 2, 2)], [True, 1.0]]
)
def test_gates(weights: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"weights|gate"):
        Sum("task", "style", weights=weights)


@pytest.mark.parametrize(
    "gate, part",
    [
        (torch.tensor([1.0, float("nan")]), "finite numbers; got"),
        (torch.tensor(float("inf")), "finite numbers; got inf"),
        (torch.tensor([1j, 1.0]), "finite numbers"),
        (torch.tensor(1.0, requires_grad=True), r"a Learned\(\)"),
    ],
)
def test_gates_that_are_no_numbers(gate: torch.Tensor, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Sum("task", weights=[gate])


@pytest.mark.parametrize("given", [0, 1, 2, 8])
@pytest.mark.parametrize("which", ["lora", "prefix", "bottleneck"])
def test_gates_for_another_number_of_rows(which: str, given: int) -> None:
    """Also a half or a double of them, which generation repeats for its beams and a call does not."""
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    view.add_adapter("other", CASES[which])
    gate = Sum("other", weights=[torch.ones(given)])
    calls: list[Callable[[], Any]] = [
        lambda: logits(view, ids(4), adapters=gate),
        lambda: logits(view, ids(4), adapter_names=[gate, None, "task", "task"]),
        lambda: view.generate(ids(4), adapters=gate, max_new_tokens=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"given for {given} rows, but the batch has 4 rows"):
            call()
    assert error_free(view)


def test_virtual_tokens_returned_by_some() -> None:
    """The output has one length: what one adapter returns and another does not cannot be in one call."""
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    view.add_adapter("kept", PromptTuningConfig(num_virtual_tokens=2, output_virtual_tokens=True))
    view.add_adapter("cut", PromptTuningConfig(num_virtual_tokens=2))
    assert logits(view, adapters="kept >> task").shape[1] == 9
    for call in (
        lambda: logits(view, adapters="kept >> cut"),
        lambda: logits(view, adapter_names=["kept", "cut", None]),
    ):
        with pytest.raises(ValueError, match=r"'kept' returns.*'cut' does not"):
            call()
    with pytest.raises(ValueError, match="prompts of one length"):
        logits(view, adapter_names=["kept", "task", None])
    assert error_free(view)


def test_what_is_in_use_is_deleted() -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    view.add_adapter("style", CASES["lora"])
    with view.using("style >> task"):
        view.delete_adapter("style")
        with pytest.raises(ValueError, match="no adapter 'style'"):
            logits(view)
    assert error_free(view)


def test_numbers_in_texts() -> None:
    view = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False), adapter_name="task")
    view.add_adapter("style", LoraConfig(r=4, init_lora_weights=False))
    for text in (
        "1e+2*task+style",
        "1E2*task + style",
        "100.*task+1e0*style",
        "style + 1e+02 * task",
        "+".join(["task"] * 100 + ["style"]),
    ):
        assert torch.allclose(
            logits(view, adapters=text), logits(view, adapters=Sum("task", "style", weights=[100, 1])), rtol=1e-3
        ), text


def test_gates_in_a_call() -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    with pytest.raises(ValueError, match=r"2 rows.*3 rows"):
        logits(view, adapters=Sum("task", weights=[torch.ones(2)]))
    view.add_adapter("prefix", CASES["prefix"])
    with pytest.raises(ValueError, match="gate below 0"):
        logits(view, adapters="-1*prefix")
    view.add_adapter("long", PromptTuningConfig(num_virtual_tokens=5))
    view.add_adapter("short", PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"\[2, 5\] tokens.*Seq"):
        logits(view, adapters="long + short")
    with pytest.raises(TypeError, match="int"):
        view.set_adapter(3)
    assert error_free(view)


def error_free(view: PeftModel) -> bool:
    """Whether the view still gives what its adapter alone gives: nothing of a failed call is left."""
    return torch.equal(logits(view), logits(view, adapters="task")) and torch.equal(
        logits(view.get_base_model()), logits(llama())
    )


@pytest.mark.parametrize("names", [["task"], ["task"] * 4, []])
def test_adapter_names_of_another_length(names: list[str]) -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    for call in (logits, lambda v, **o: v.generate(ids(), **o)):
        with pytest.raises(ValueError, match=rf"{len(names)} entries.*3 rows"):
            call(view, adapter_names=names)
    assert error_free(view)


def test_adapter_names_that_are_no_list() -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="task")
    with pytest.raises(TypeError, match=r"got a str: 'task'.*adapters="):
        logits(view, adapter_names="task")
    with pytest.raises(ValueError, match="not both"):
        logits(view, adapters="task", adapter_names=["task"] * 3)


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_merging_what_cannot_be_merged() -> None:
    view = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False), adapter_name="task")
    for name in ("bottleneck", "prompt", "prefix"):
        view.add_adapter(name, CASES[name])
    before = traces(view)
    mixed = ["task", "prompt", "prefix"]
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: view.merge_adapter("bottleneck"), TypeError, "'bottleneck' cannot be merged.*model.layers"),
        (lambda: view.merge_adapter("task + bottleneck"), TypeError, "'bottleneck' cannot be merged"),
        (lambda: view.merge_adapter("prompt"), ValueError, "nothing to merge"),
        (lambda: view.merge_and_unload(adapter_names=mixed), TypeError, "'prompt', 'prefix' cannot"),
        (lambda: view.merge_and_unload(adapter_names="bottleneck"), TypeError, "'bottleneck' cannot be merged"),
        (lambda: view.merge_adapter(Sum("task", weights=[torch.ones(3)])), ValueError, "row"),
        (lambda: view.unmerge_adapter(), RuntimeError, "Nothing is merged"),
    ]
    for call, kind, part in calls:
        with pytest.raises(kind, match=part):
            call()
        assert traces(view) == before
        assert view.active_adapters == ["task"]
    with torch.no_grad():
        next(iter(view.get_adapter("task").parameters())).fill_(float("inf"))
    with pytest.raises(ValueError, match=r"not finite"):
        view.merge_adapter()
    assert torch.equal(logits(view.get_base_model()), logits(llama()))


def test_a_merged_base_is_not_changed_twice() -> None:
    base = llama()
    view = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False), adapter_name="task")
    other = get_peft_model(base, LoraConfig(r=4), adapter_name="other")
    view.add_adapter("style", LoraConfig(r=2))
    view.merge_adapter()
    merged = logits(view)
    calls: list[Callable[[], Any]] = [
        lambda: view.merge_adapter(),
        lambda: other.merge_adapter(),
        lambda: logits(other),
        lambda: view.set_adapter("style"),
        lambda: logits(view, adapters="style"),
        lambda: view.add_adapter("new", LoraConfig(r=2)),
        lambda: view.delete_adapter("task"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="unmerge_adapter"):
            call()
    assert torch.equal(logits(view), merged)
    view.unmerge_adapter()
    assert torch.equal(logits(base), logits(llama()))
