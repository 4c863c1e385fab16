"""ReFT: the paper's edit at the right tokens, with padding, virtual tokens and a cache; its three forms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coadapt import DiReftConfig, LoReftConfig, NoReftConfig, PeftModel, PromptTuningConfig, ReftConfig, get_peft_model
from models import MODELS, gpt2, ids, llama, logits, stir

FORMS = {"LoReFT": LoReftConfig, "NoReFT": NoReftConfig, "DiReFT": DiReftConfig}


def block_outputs(view: Any, number: int, **call: Any) -> Tensor:
    seen: list[Tensor] = []
    block = view.get_base_model().model.layers[number]
    handle = block.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    view(**call)
    handle.remove()
    return seen[0]


def edited(method: Any, h: Tensor, form: str) -> Tensor:
    """Equations 2 and 5 of the paper, with orthonormal rows by another way."""
    rows = method.R
    if form == "LoReFT":
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        span = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ rows  # orthonormal rows of the same space
        rotation = method.rows() @ span.T
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
        rows = rotation @ span
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
    source = h @ method.source.weight.T + method.source.bias
    return h + (source if form == "DiReFT" else source - h @ rows.T) @ rows


@pytest.mark.parametrize("form", FORMS)
def test_the_papers_edit_at_the_ends(form: str) -> None:
    """In a padded row the ends are those of its real tokens; what lies between stays."""
    options: dict[str, Any] = {"r": 3, "prefix_positions": 2, "suffix_positions": 1, "layers": [1]}
    view = get_peft_model(llama(), FORMS[form](**options)).eval()
    stir(view.adapters, by=0.3)
    (part,) = view.get_adapter("default").parts
    assert part.place.path == "model.layers.1"
    tokens, mask = ids(2), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    call = {"input_ids": tokens, "attention_mask": mask}
    plain, found = (block_outputs(view, 1, **call, adapters=a) for a in ([], "default"))
    method: Any = part.method
    expected = plain.clone()
    for row, first in ((0, 3), (1, 0)):
        ends = slice(first, first + 2)
        expected[row, ends] = edited(method.first, plain[row, ends], form)
        expected[row, -1] = edited(method.last, plain[row, -1], form)
    expected[0, :3] = found[0, :3]  # of padding nothing is said
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0, :3], plain[0, :3])


def test_tied_weights_are_one_edit() -> None:
    tied = get_peft_model(llama(), ReftConfig(suffix_positions=2, tied_weights=True))
    apart = get_peft_model(llama(), ReftConfig(suffix_positions=2))
    count = [sum(p.numel() for p in v.parameters() if p.requires_grad) for v in (tied, apart)]
    assert count == [2 * (2 * 32 + 1), 2 * 2 * (2 * 32 + 1)]
    stir(tied.adapters)
    short = ids(1, 2)  # each token is both first and last: edited once
    method: Any = tied.get_adapter("default").parts[0].method
    plain = block_outputs(tied, 0, input_ids=short, adapters=[])
    found = block_outputs(tied.eval(), 0, input_ids=short)
    torch.testing.assert_close(found, plain + method.first(plain), rtol=1e-5, atol=1e-5)


def test_virtual_tokens_are_not_counted() -> None:
    view = get_peft_model(llama(), ReftConfig(prefix_positions=1, dropout=0.0)).eval()
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    stir(view.adapters, by=0.3)
    plain = block_outputs(view, 0, input_ids=ids(2), adapters="prompt")
    found = block_outputs(view, 0, input_ids=ids(2), adapters="prompt >> default")
    moved = (found - plain).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.tolist() == [False, False, True, *[False] * 6]


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_generation_edits_the_last_of_what_was_given(model: str) -> None:
    view = get_peft_model(MODELS[model](), ReftConfig(suffix_positions=2, dropout=0.0)).eval()
    stir(view.adapters, by=0.3)
    tokens, mask = ids(2), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    both = view.generate(tokens, attention_mask=mask, **options)
    for row, first in ((0, 3), (1, 0)):
        alone = view.generate(tokens[row : row + 1, first:], attention_mask=mask[row : row + 1, first:], **options)
        assert torch.equal(alone[0, -5:], both[row, -5:])
    with pytest.raises(ValueError, match="edits the last tokens"):
        view.generate(tokens, attention_mask=mask, use_cache=False, **options)


def test_a_prompt_shorter_than_the_prefix_goes_on_being_edited() -> None:
    view = get_peft_model(gpt2(), ReftConfig(prefix_positions=4, dropout=0.0)).eval()
    stir(view.adapters, by=0.5)
    tokens, options = ids(1, 2), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = view.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert torch.equal(
        cached, view.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **options)
    )
    for _ in range(5):
        tokens = torch.cat([tokens, logits(view, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, tokens)


def test_rows_stay_orthonormal_while_they_train() -> None:
    view = get_peft_model(llama(), LoReftConfig(r=4, dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in view.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        view(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    for part in view.get_adapter("default").parts:
        rows = part.method.first.rows()  # type: ignore[union-attr]
        torch.testing.assert_close(rows @ rows.mT, torch.eye(4), rtol=1e-4, atol=1e-4)


def test_forms_are_one_method_in_files(tmp_path: Any) -> None:
    view = get_peft_model(llama(), DiReftConfig(layers=[0])).eval()
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(view))
    assert again.peft_config["default"].subtract_projection is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "has 2 layers, numbered from 0"),
        ({"layers": []}, "neither 'all' nor a list"),
        ({"layers": "some"}, "neither 'all' nor a list"),
        ({"prefix_positions": 0}, "name no token"),
        ({"tied_weights": True}, "has no effect"),
        ({"non_linearity": "gelo"}, "Did you mean 'gelu"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(), ReftConfig(**options))
