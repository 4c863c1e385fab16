"""`ensure_weight_tying`: what is adapted, or copied, at one of two tied layers is the same parameter at the other."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coadapt import LoraConfig, PeftModel, get_peft_model
from formats.field import far, field_loaded, field_logits, field_quietly, tied
from models import FAMILIES, MODELS, ids, llama, logits, stir

TIES: dict[str, Any] = {"r": 4, "lora_alpha": 6, "ensure_weight_tying": True}


def methods(view: PeftModel, *ends: str) -> list[Any]:
    return [p.method for end in ends for p in view.get_adapter("default").parts if p.place.path.endswith(end)]


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_both_have_one_change(name: str) -> None:
    """The weight that both have changes by s B A, and the gradient is the sum of what both contribute."""
    base = tied()
    config = LoraConfig(**TIES, target_modules=[name], init_lora_weights=False)
    view = get_peft_model(base, config)
    embedding, head = methods(view, "embed_tokens", "lm_head")
    assert [p.shape for p in view.get_adapter("default").parameters()] == [(4, 64), (32, 4)]
    for method, layer in ((embedding, base.model.embed_tokens), (head, base.lm_head)):
        assert method.A is embedding.A
        weight = layer.weight if layer is base.lm_head else layer.weight.mT
        expected = (embedding.B @ embedding.A) * 1.5
        assert far(method.merge(weight) - weight, expected.mT if layer is base.lm_head else expected) < 1e-6
    other = tied()
    other.model.embed_tokens.weight = nn.Parameter(base.lm_head.weight.detach() + 1.5 * (embedding.B @ embedding.A).mT)
    other.tie_weights()
    assert far(logits(view), logits(other)) < 1e-5
    for model in (view, other):
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert far(embedding.B.grad, 1.5 * (embedding.A @ other.lm_head.weight.grad).mT) < 1e-5


def test_the_gradient_is_the_sum_of_the_fields(tmp_path: Path) -> None:
    """Theirs are two parameters each in the same memory, so that each has one layer's part, and Adam steps twice."""
    view = get_peft_model(tied(), LoraConfig(**TIES, target_modules=["embed_tokens"]))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    model = field_quietly(lambda: peft.PeftModel.from_pretrained(tied(), tmp_path, is_trainable=True))
    for each in (view, model):
        each(input_ids=ids(), labels=ids()).loss.backward()
    embedding, head = model.get_input_embeddings(), model.base_model.model.lm_head
    ours = methods(view, "embed_tokens")[0]
    theirs = embedding.lora_embedding_B["default"].grad, head.lora_A["default"].weight.grad.mT
    assert min(float(part.abs().max()) for part in theirs) > 1e-4
    assert far(ours.B.grad, sum(theirs)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, {"modules_to_save": ["embed_tokens"]}],
)
def test_a_merged_model_is_still_tied(options: dict[str, Any]) -> None:
    view = get_peft_model(tied(), LoraConfig(**TIES, **options))
    stir(view.adapters)
    expected = logits(view.eval())
    merged = view.merge_and_unload()
    assert far(logits(merged), expected) < 1e-5
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def test_a_copy_is_one_parameter_that_trains_at_both() -> None:
    view = get_peft_model(tied(), LoraConfig(**TIES, modules_to_save=["lm_head"]))
    one, other = methods(view, "embed_tokens", "lm_head")
    assert one.copy.weight is other.copy.weight
    assert not isinstance(one.copy, nn.Linear)
    before = logits(view.get_base_model())
    view(input_ids=ids(), labels=ids()).loss.backward()
    reference = tied().requires_grad_(True)
    reference(input_ids=ids(), labels=ids()).loss.backward()
    assert far(one.copy.weight.grad, reference.lm_head.weight.grad) < 1e-5
    assert torch.equal(logits(view.get_base_model()), before)


@pytest.mark.parametrize(("model", "reads"), [("gpt2", True), ("t5", False), ("opt", True)])
def test_other_models_and_their_files(model: str, reads: bool, tmp_path: Path) -> None:
    base = (MODELS | FAMILIES)[model]()
    name = {"gpt2": "wte", "t5": "lm_head", "opt": "embed_tokens"}[model]
    view = get_peft_model(base, LoraConfig(**TIES, target_modules=[name], modules_to_save=None))
    stir(view.adapters)
    expected = logits(view.eval())
    assert len({id(m.A) for m in methods(view, "")}) == 1 < len(methods(view, ""))
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained((MODELS | FAMILIES)[model](), tmp_path)
    assert torch.equal(logits(again), expected)
    assert len({id(m.A) for m in methods(again, "")}) == 1
    if reads:
        assert far(field_logits(field_loaded((MODELS | FAMILIES)[model](), tmp_path)), expected) < 1e-5
    assert ("readable_by_peft" in (tmp_path / "adapter_config.json").read_text()) is not reads


def test_the_fields_parameters_that_came_apart_are_refused(tmp_path: Path) -> None:
    """Moving its model gives each of its tied parameters memory of its own."""
    model = field_quietly(lambda: peft.get_peft_model(tied(), peft.LoraConfig(**TIES, target_modules=["embed_tokens"])))
    model.double()
    with torch.no_grad():
        model.get_input_embeddings().lora_embedding_B["default"] += 1.0
    field_quietly(lambda: model.save_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"lm_head.lora_A.weight is not what the layer has that it is tied to"):
        PeftModel.from_pretrained(tied(), tmp_path)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target_modules": ["q_proj"]}, r"ensure_weight_tying has no effect: none of the layers"),
        (
            {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
            r"embed_tokens'\] are in target_modules and in modules_to_save",
        ),
        (
            {"target_modules": ["embed_tokens", "lm_head"], "exclude_modules": ["lm_head"]},
            r"changes \['lm_head'\] as what they are tied to, but exclude_modules leaves them out",
        ),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, r"makes plain LoRAs one; DORA"),
        ({"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 2}}, r"another rank or scale"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, r"is tied to, with other tokens"),
    ],
)
def test_what_cannot_be_tied_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        get_peft_model(tied(), LoraConfig(**TIES, **options))


def test_a_model_that_ties_nothing_is_refused() -> None:
    for options in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match=r"in common with another layer of this LlamaForCausalLM"):
            get_peft_model(llama(), LoraConfig(**TIES, **options))


def test_tokens_of_both_are_named_once() -> None:
    named = {"embed_tokens": [1, 5], "lm_head": [1, 5]}
    view = get_peft_model(tied(), LoraConfig(**TIES, trainable_token_indices=named))
    rows = [m.rows for m in methods(view, "embed_tokens", "lm_head")]
    assert len(rows) == 2
    assert rows[0] is rows[1]


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 7]}],
)
@pytest.mark.parametrize("assign", [False, True])
def test_states_hold_each_tensor_once(options: dict[str, Any], assign: bool, tmp_path: Path) -> None:
    """Files of tensors refuse to hold one twice, a Trainer's checkpoints among them."""
    one, two = (get_peft_model(tied(), LoraConfig(**TIES, **options)).eval() for _ in range(2))
    stir(one.adapters)
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    two.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=assign)
    assert torch.equal(logits(two), logits(one))
    assert len(list(two.adapters.parameters())) == len(list(one.adapters.parameters()))
    again = PeftModel.from_pretrained(tied(), tmp_path)
    assert torch.equal(logits(again), logits(one))
