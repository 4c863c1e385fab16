"""Multitask prompts: a row has its task's prompt, with a cache, beams and others; starts from source tasks."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from coadapt import MultitaskPromptTuningConfig, PeftModel, get_peft_model
from formats.field import field_loaded, field_quietly
from models import bart, ids, llama, logits, stir, t5

THREE: dict[str, Any] = {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}


def trained(base: Any, **options: Any) -> PeftModel:
    view = get_peft_model(base, MultitaskPromptTuningConfig(**THREE, **options)).eval()
    stir(view.adapters, by=0.5)
    return view


@pytest.mark.parametrize("make", [llama, t5])
def test_a_row_has_the_prompt_of_its_task(make: Any) -> None:
    view = trained(make())
    tokens = ids(4)
    together = logits(view, tokens, task_ids=[2, 0, 1, 2])
    for row, task in enumerate([2, 0, 1, 2]):
        alone = logits(view, tokens[row : row + 1], task_ids=[task])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert float((logits(view, tokens, task_ids=[0] * 4) - together).detach().abs().max()) > 1e-3


def test_the_prompt_is_the_papers() -> None:
    """P_k = P* o (u_k v_k^T), equation 3, and of rank R the sum of R of them."""
    view = trained(llama())
    method: Any = view.get_adapter("default").parts[0].method
    for task, found in enumerate(method.prompt()):
        whole = sum(torch.outer(method.U[task, :, r], method.shared_rows[0].V[task, r]) for r in range(2))
        torch.testing.assert_close(found, method.P * whole)


def test_generation_follows_the_tasks() -> None:
    view = trained(llama())
    tokens, options = ids(2), {"max_new_tokens": 5, "do_sample": False, "task_ids": [2, 1]}
    mask = torch.ones_like(tokens)
    cached = view.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(cached, view.generate(tokens, attention_mask=mask, use_cache=False, **options))
    beams = view.generate(tokens, attention_mask=mask, num_beams=2, **options)
    for row, task in enumerate([2, 1]):
        one: dict[str, Any] = {**options, "task_ids": [task], "attention_mask": mask[:1], "num_beams": 2}
        alone = view.generate(tokens[row : row + 1], **one)
        assert torch.equal(alone, beams[row : row + 1, : alone.shape[1]])


def test_beside_others_and_row_by_row() -> None:
    view = trained(llama())
    view.add_adapter("b", MultitaskPromptTuningConfig(**THREE))
    stir(view.adapters, seed=4)
    tokens, names, tasks = ids(3), ["default >> b", "b", None], [1, 0, 2]
    together = logits(view, tokens, adapter_names=names, task_ids=tasks)
    for row, (name, task) in enumerate(zip(names, tasks, strict=True)):
        told = {"task_ids": [task]} if name else {}
        alone = logits(view, tokens[row : row + 1], adapters=name or [], **told)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [llama, bart])
def test_starts_from_source_tasks(make: Any, tmp_path: Path) -> None:
    sites = {"prompt_sites": ["encoder", "decoder"]} if make is bart else {}
    source = trained(make(), **sites)
    source.save_pretrained(tmp_path)
    tokens, file = ids(2), str(tmp_path / "adapter_model.safetensors")

    def started(how: str, **options: Any) -> PeftModel:
        told = {
            "prompt_tuning_init": how,
            "prompt_tuning_init_state_dict_path": file,
            "num_ranks": 2,
            **sites,
            **options,
        }
        return get_peft_model(make(), MultitaskPromptTuningConfig(num_virtual_tokens=3, **told)).eval()

    one = started("EXACT_SOURCE_TASK", prompt_tuning_init_task=2)
    torch.testing.assert_close(logits(one, tokens), logits(source, tokens, task_ids=[2, 2]))
    one.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(make(), tmp_path / "again"), tokens), logits(one, tokens)
    )
    before: Any = source.get_adapter("default").parts[-1].method
    mean: Any = started("AVERAGE_SOURCE_TASKS").get_adapter("default").parts[-1].method
    torch.testing.assert_close(mean.U[0], before.U.mean(0))
    torch.testing.assert_close(mean.shared_rows[0].V[0], before.shared_rows[0].V.mean(0))
    shared: Any = started("ONLY_SOURCE_SHARED", num_tasks=4).get_adapter("default").parts[-1].method
    torch.testing.assert_close(shared.P, before.P)
    assert float(shared.U.detach().std()) == pytest.approx(0.02, rel=0.5)
    with pytest.raises(ValueError, match="was trained with other sizes"):
        started("EXACT_SOURCE_TASK", num_ranks=3)


def test_the_fields_files_of_encoder_decoders(tmp_path: Path) -> None:
    """There both stacks have a prompt where labels are given, and a call with `decoder_input_ids` fails."""
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", **THREE)
    theirs = field_quietly(lambda: peft.get_peft_model(t5(), config)).eval()
    stir(theirs.prompt_encoder, by=0.5)
    field_quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    ours = PeftModel.from_pretrained(t5(), tmp_path / "theirs")
    tokens, tasks = ids(3), torch.tensor([2, 0, 1])
    labels, mask = tokens[:, :5].contiguous(), torch.ones_like(tokens)
    found = ours(input_ids=tokens, attention_mask=mask, labels=labels, task_ids=tasks)
    field = theirs(input_ids=tokens, attention_mask=mask, labels=labels, task_ids=tasks)
    torch.testing.assert_close(found.logits, field.logits[:, 3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, field.loss)
    ours.save_pretrained(tmp_path / "ours")
    again = field_loaded(t5(), tmp_path / "ours")(input_ids=tokens, attention_mask=mask, labels=labels, task_ids=tasks)
    torch.testing.assert_close(again.logits, field.logits, rtol=1e-5, atol=1e-5)
    trained(t5()).save_pretrained(tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / "adapter_config.json").read_text())["readable_by_peft"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks=0 must be a whole number"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "do not go together"),
        ({"prompt_tuning_init_state_dict_path": "there"}, "do not go together"),
        ({"prompt_tuning_init_task": 1}, "has no effect"),
        (
            {
                "prompt_tuning_init": "AVERAGE_SOURCE_TASKS",
                "prompt_tuning_init_state_dict_path": "there",
                "num_tasks": 2,
            },
            "starts one task",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultitaskPromptTuningConfig(num_virtual_tokens=2, **options)


def test_calls_say_which_tasks() -> None:
    view = trained(llama())
    with pytest.raises(ValueError, match="tells tasks apart"):
        logits(view)
    with pytest.raises(ValueError, match="knows 3 tasks"):
        logits(view, task_ids=[0, 1, 3])
    with pytest.raises(ValueError, match="a prompt for each of 3 tasks"):
        view.combine("default", adapter_name="one")
    single = get_peft_model(llama(), MultitaskPromptTuningConfig(num_virtual_tokens=2))
    assert torch.equal(logits(single), logits(single, task_ids=[0, 0, 0]))
