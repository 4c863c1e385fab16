"""Context-aware prompts: their loss, what trains of them, and that it stays near; against the field, in any loop."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from coadapt import CPTConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from formats.field import field_quietly
from models import ids, llama, stir, t5

CONTEXT: dict[str, Any] = {
    "cpt_token_ids": [5, 9, 4, 8, 11, 12, 13, 14],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "task_type": "CAUSAL_LM",
}
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}


def both(**options: Any) -> tuple[PeftModel, Any]:
    ours = get_peft_model(llama(), CPTConfig(**CONTEXT, **options)).eval()
    theirs = field_quietly(lambda: peft.get_peft_model(llama(), peft.CPTConfig(**CONTEXT, **options))).eval()
    return ours, theirs


def rows() -> dict[str, Tensor]:
    tokens = ids()
    labels = tokens.clone()
    labels[:, :3] = -100
    labels[1, 4] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("options", [{}, DECAY, {**DECAY, "opt_projection_epsilon": 0.5}])
def test_steps_are_the_fields(options: dict[str, Any]) -> None:
    """Losses, gradients and what two steps make of it; the second of which runs into the ball."""
    ours, theirs = both(**options)
    method: Any = ours.get_adapter("default").parts[0].method
    encoder: Any = theirs.prompt_encoder["default"]
    steps = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0) for m in (ours, theirs)]
    for _ in range(3):
        found, field = ours(**rows()), theirs(**rows())
        torch.testing.assert_close(found.loss, field.loss)
        torch.testing.assert_close(found.logits, field.logits[:, 8:], rtol=1e-5, atol=1e-5)
        for out, step in ((found, steps[0]), (field, steps[1])):
            step.zero_grad()
            out.loss.backward()
            step.step()
        torch.testing.assert_close(method.delta.grad, encoder.delta_embedding.weight.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(method.prompt(), encoder(torch.arange(8)))
    length = method.delta.detach().norm(dim=1)
    assert bool((length[[3, 7]] == 0).all()), "labels are not trained"
    assert bool((length <= method.radius + 1e-6).all())
    assert bool((length[[0, 4]] >= method.radius[[0, 4]] - 1e-6).all()), "otherwise this has not tried the ball"


def test_the_loss_written_out() -> None:
    ours, _ = both(**DECAY)
    stir(ours.adapters)
    batch = rows()
    logits = ours(**{**batch, "labels": None}, adapters="default", output_hidden_states=False).logits
    whole = get_peft_model(llama(), CPTConfig(**CONTEXT, output_virtual_tokens=True)).eval()
    whole.get_adapter("default").load_state_dict(ours.get_adapter("default").state_dict())
    scores = whole(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    torch.testing.assert_close(scores[:, 8:].softmax(-1), logits.softmax(-1))
    terms: list[Tensor] = []
    for row in range(3):
        terms += [-0.7 * scores[row, 6, 14], -0.49 * scores[row, 2, 8]]
        terms += [-scores[row, 7 + t, y] for t, y in enumerate(batch["labels"][row].tolist()) if y != -100]
    torch.testing.assert_close(ours(**batch).loss, torch.stack(terms).mean())


def test_padding_stands_in_front_of_the_context() -> None:
    """A padded row has the loss that it has alone; the output is as long as the input."""
    ours, _ = both()
    tokens = ids(2)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    padded = ours(input_ids=tokens[:1], attention_mask=mask[:1], labels=labels[:1], output_hidden_states=True)
    alone = ours(input_ids=tokens[:1, 3:], labels=labels[:1, 3:])
    torch.testing.assert_close(padded.loss, alone.loss)
    assert padded.logits.shape[1] == padded.hidden_states[-1].shape[1] == 7
    loss, scores, *_ = ours(input_ids=tokens[:1, 3:], labels=labels[:1, 3:], return_dict=False)
    torch.testing.assert_close((loss, scores), (alone.loss, alone.logits))


def test_a_stock_trainer_trains_with_that_loss(tmp_path: Path) -> None:
    """Also over accumulated batches, whose labels are counted together."""
    batch = rows()
    data = [{k: v[i] for k, v in batch.items()} for i in range(3)]
    seen: list[float] = []
    for size, steps in ((3, 1), (1, 3)):
        ours, _ = both(**DECAY)
        options: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, use_cpu=True, **options
        )
        expected = float(ours.train()(**batch).loss.detach())
        trainer = Trainer(model=ours, args=args, train_dataset=data)
        trainer.train()
        seen.append(trainer.state.log_history[0]["loss"])
        if size == 3:
            assert seen[0] == pytest.approx(expected, rel=1e-3)
        assert int(ours.get_adapter("default").steps) == 1  # type: ignore[arg-type]
    assert seen[1] == pytest.approx(seen[0], rel=0.05), "the context's labels weigh by rows there"


def test_saved_in_the_middle_it_goes_on_around_the_same_examples(tmp_path: Path) -> None:
    ours, _ = both()
    method: Any = ours.get_adapter("default").parts[0].method
    with torch.no_grad():
        method.delta.normal_(std=1e-3)
        method.delta[[3, 7]] = 0
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    found: Any = again.get_adapter("default").parts[0].method
    torch.testing.assert_close(found.delta, method.delta, rtol=1e-4, atol=1e-7)
    assert torch.equal(found.E, method.E)


def test_beside_a_lora_it_keeps_its_loss_and_alone_a_lora_has_the_bases() -> None:
    ours, _ = both()
    ours.add_adapter("lora", LoraConfig(r=2, init_lora_weights=False))
    batch = rows()
    mixed, own = ours(**batch, adapters="default >> lora").loss, ours(**batch).loss
    assert float((mixed - own).detach().abs()) > 1e-4
    plain = ours(**batch, adapters="lora")
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(plain.loss, expected)


def test_what_is_refused() -> None:
    ours, _ = both()
    ours.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    batch = rows()
    with pytest.raises(ValueError, match="its loss needs 8 virtual tokens"):
        ours(**batch, adapters="default >> prompt")
    with pytest.raises(ValueError, match="a call has one loss"):
        ours(**batch, adapter_names=["default", None, "prompt"])
    with pytest.raises(ValueError, match="input_type_mask is not read"):
        ours(**batch, input_type_mask=torch.ones(3, 7))
    with pytest.raises(ValueError, match="is no causal language model"):
        get_peft_model(t5(), CPTConfig(cpt_token_ids=[3]))
    with pytest.raises(ValueError, match="the model has 64 tokens"):
        get_peft_model(llama(), CPTConfig(cpt_token_ids=[3, 64]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpt_token_ids": []}, "0 cpt_token_ids"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens=3"),
        ({"cpt_tokens_type_mask": [1]}, "cpt_tokens_type_mask has 1 entries"),
        ({"cpt_mask": [1, 0]}, "hides tokens"),
        ({"opt_projection_epsilon": 0.0}, "must be above 0"),
        ({"opt_loss_decay_factor": 0.5}, "has no effect"),
        ({"task_type": "SEQ_CLS"}, "is not one of"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPTConfig(**{"cpt_token_ids": [3, 4], **options})
