"""X-LoRA: gates, outputs and gradients of the field's, on the same adapters and network; files; what is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, Sum, XLoraConfig, XLoraRouter, get_peft_model
from formats.field import field_quietly
from laws.setting import recompute
from models import bert, ids, llama, logits, stir

FORMS: dict[str, dict[str, Any]] = {
    "one": {},
    "deep": {"xlora_depth": 3, "xlora_size": 16},
    "layerwise": {"xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": True},
    "top-1": {"top_k_lora": 1, "softmax_temperature": 0.5},
    "top-2-softmax": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "raw": {"enable_softmax": False, "global_scaling_weight": 0.5},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("experts")
    for name in "012":
        view = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        stir(view.adapters, seed=int(name), by=0.3)
        view.save_pretrained(root / name)
    return {name: str(root / name) for name in "012"}


def both(adapters: dict[str, str], **options: Any) -> tuple[PeftModel, Any]:
    said: dict[str, Any] = {"hidden_size": 32, "adapters": adapters, **options}
    base = llama(use_cache=False)
    theirs = field_quietly(lambda: peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **said))).eval()
    ours = get_peft_model(llama(), XLoraConfig(**said)).eval()
    router: Any = ours.composition.router  # type: ignore[union-attr]
    linears = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
    own = [m for m in router.mlp if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for layer, field in zip(own, linears, strict=True):
            field.weight.normal_()
            layer.weight.copy_(field.weight)
            layer.bias.copy_(field.bias)
    return ours, theirs


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_the_fields(form: str, adapters: dict[str, str]) -> None:
    ours, theirs = both(adapters, **FORMS[form])
    made = []
    for model in (ours, theirs):
        out = model(input_ids=ids()).logits
        (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).sum().backward()
        made.append(out.detach())
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-5)
    assert float((made[0] - logits(llama())).abs().max()) > 1e-3
    found = [p.grad for p in ours.parameters() if p.requires_grad]
    field = [p.grad for p in theirs.base_model.internal_xlora_classifier.parameters()]
    assert len(found) == len(field), "only the network trains"
    for one, other in zip(found, field, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["deep", "top-1"])
def test_it_generates_as_the_field_does(form: str, adapters: dict[str, str]) -> None:
    """The field without a cache; ours with one, too."""
    ours, theirs = both(adapters, **FORMS[form])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    tokens = ids(1)
    mask = torch.ones_like(tokens)
    expected = field_quietly(lambda: theirs.generate(input_ids=tokens, attention_mask=mask, **options))
    for cached in (False, True):
        assert torch.equal(ours.generate(tokens, attention_mask=mask, use_cache=cached, **options), expected)


@pytest.mark.parametrize("form", ["one", "layerwise", "top-1"])
def test_with_a_cache_as_without(form: str, adapters: dict[str, str]) -> None:
    """Token by token and in pieces, with padding in front; what is done to the cache is done to the bare model's."""
    view, _ = both(adapters, **FORMS[form])
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    tokens[1, :3], mask[1, :3] = 0, 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    whole = view(input_ids=tokens, attention_mask=mask, position_ids=at).logits
    with torch.no_grad():
        assert (
            float((whole - view.get_base_model()(tokens, attention_mask=mask, position_ids=at).logits).abs().max())
            > 1e-3
        )
    cache, found = None, []
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        out = view(
            input_ids=tokens[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=at[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        assert cache.get_seq_length() == end
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1)[mask > 0], whole[mask > 0], rtol=1e-5, atol=1e-5)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(7 - cache.get_seq_length())
    order = [2, 0, 0]
    out = view(
        input_ids=tokens[order, 7:], attention_mask=mask[order], position_ids=at[order, 7:], past_key_values=cache
    )
    torch.testing.assert_close(out.logits, whole[order, 7:], rtol=1e-5, atol=1e-5)


def test_beams_and_sampled_prompts_with_a_cache(adapters: dict[str, str]) -> None:
    view, _ = both(adapters, **FORMS["deep"])
    tokens = ids(2)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with_one = view.generate(tokens, use_cache=True, **options)
    assert torch.equal(with_one, view.generate(tokens, use_cache=False, **options))


def test_a_cache_that_the_bare_model_did_not_see(adapters: dict[str, str]) -> None:
    view, _ = both(adapters)
    with view.disable_adapter():
        cache = view(input_ids=ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="7 tokens of calls that did not"):
        view(input_ids=ids(3, 1), past_key_values=cache)
    cache = view(input_ids=ids(), use_cache=True).past_key_values
    with view.disable_adapter():
        view(input_ids=ids(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="8 tokens of calls that did not"):
        view(input_ids=ids(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="not a static one"):
        view.generate(ids(1), max_new_tokens=2, cache_implementation="static")


FILES = {**FORMS, "three layers, none dropped": {"xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0}}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(f, marks=() if f in ("layerwise", "three layers, none dropped") else pytest.mark.full)
        for f in FILES
    ],
)
def test_folders_go_both_ways(form: str, adapters: dict[str, str], tmp_path: Path) -> None:
    """The field writes layer i of the network into that of the adapter called i, and misses it."""
    ours, theirs = both(adapters, **FILES[form])
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), expected)
    base = llama(use_cache=False)
    read = field_quietly(lambda: peft.PeftModel.from_pretrained(base, tmp_path / "ours")).eval()  # it misses the LoRAs
    torch.testing.assert_close(read(input_ids=ids()).logits, expected, rtol=1e-5, atol=1e-5)
    field_quietly(lambda: theirs.save_pretrained(tmp_path / "theirs"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    assert not [p for p in again.parameters() if p.requires_grad]
    again.set_adapter("expert_0")
    again.save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    trains = PeftModel.from_pretrained(llama(), tmp_path / "theirs", is_trainable=True)
    assert sum(p.requires_grad for p in trains.parameters()) == 2 * FILES[form].get("xlora_depth", 1)


def test_the_fields_folders_that_are_not_whole(adapters: dict[str, str], tmp_path: Path) -> None:
    _, theirs = both(adapters, **FORMS["deep"])
    field_quietly(lambda: theirs.save_pretrained(tmp_path))
    root = load_file(tmp_path / "adapter_model.safetensors")
    first = load_file(tmp_path / "0" / "adapter_model.safetensors")
    inside = "base_model.internal_xlora_classifier.layers."
    assert sorted(root) == [f"{inside}{i}.{n}" for i in (3, 6) for n in ("bias", "weight")]
    assert first[f"{inside}weight"].shape == (16, 32)
    (tmp_path / "0").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"without .*layers\.0\.weight, .*layers\.0\.bias"):
        PeftModel.from_pretrained(llama(), tmp_path)
    whole = {f"{inside}0.{n}": first[inside + n] for n in ("weight", "bias")}  # of a version that loses nothing
    save_file({**root, **whole}, tmp_path / "adapter_model.safetensors")
    view = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(view), theirs(input_ids=ids()).logits, rtol=1e-5, atol=1e-5)
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "adapters": {**said["adapters"], "1": "nowhere"}}))
    with pytest.raises(FileNotFoundError, match="'nowhere', that of 'expert_1'"):
        PeftModel.from_pretrained(llama(), tmp_path)
    file.write_text(json.dumps({**said, "use_trainable_adapters": True}))
    with pytest.raises(ValueError, match="trained along"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_under_checkpointing_gradients_are_the_same(adapters: dict[str, str]) -> None:
    found: list[list[Any]] = []
    for recomputes in (False, True):
        view, _ = both(adapters, xlora_dropout_p=0.0)
        torch.manual_seed(1)
        with torch.no_grad():
            view.composition.router.mlp[0].weight.normal_()  # type: ignore[union-attr]
        if recomputes:
            recompute(view, reentrant=False)
        view.train()(input_ids=ids(), labels=ids()).loss.backward()
        found.append([p.grad for p in view.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_refused(adapters: dict[str, str]) -> None:
    view = get_peft_model(llama(), XLoraConfig(hidden_size=32, adapters=adapters))
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    mixed = view.composition
    with pytest.raises(ValueError, match="leave prompts out"):
        view(input_ids=ids(), adapters=["prompt", mixed])
    encoder = PeftModel(bert())
    for name in "ab":
        encoder.add_adapter(name, LoraConfig(r=2))
    with pytest.raises(ValueError, match="at layers of a causal model"):
        encoder.set_adapter(Sum("a", "b", weights=XLoraRouter(hidden_size=32)))
    with pytest.raises(ValueError, match="fewer than two"):
        XLoraConfig(hidden_size=32, adapters={"0": "there"})
    with pytest.raises(ValueError, match="softmax_top_k has no effect"):
        XLoraConfig(hidden_size=32, adapters=adapters, enable_softmax_topk=True)
    with pytest.raises(ValueError, match="scaling_pass_value"):
        XLoraConfig(hidden_size=32, adapters=adapters, scaling_pass_value=0.5)
