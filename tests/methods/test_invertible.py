"""Invertible adapters: the inverse is exact, all places share the parameters, nothing beside them is disturbed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from coadapt import (
    BottleneckConfig,
    InvertibleConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from laws.setting import gradients, loss, recompute, same_gradients
from models import VOCABULARY, bert, gpt2, ids, llama, logits, opt, stir, t5, vit


def masked() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)).eval().requires_grad_(False)


PLACES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "llama": (llama, ["model.embed_tokens", "lm_head"]),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), ["model.embed_tokens", "lm_head"]),
    "gpt2": (gpt2, ["transformer.wte", "lm_head"]),
    "bert-classifier": (bert, ["bert.embeddings.word_embeddings"]),
    "bert-masked": (masked, ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
    "t5": (t5, ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    "t5-untied": (
        lambda: t5(tie_word_embeddings=False),
        ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    ),
}
each = pytest.mark.parametrize("family", PLACES)


def made(family: str, by: float = 0.3, **options: Any) -> tuple[PeftModel, Any]:
    """A view whose adapter is away from its start, and the method that holds the parameters."""
    view = get_peft_model(PLACES[family][0](), InvertibleConfig(**options), adapter_name="a")
    stir(view.adapters, by=by)
    return view, view.get_adapter("a").parts[0].method


def naive(method: Any, e: Tensor, back: bool = False) -> Tensor:
    """NICE's additive coupling, by its two matrices and two vectors for each network."""
    weights = dict(method.named_parameters())

    def network(name: str, z: Tensor) -> Tensor:
        hidden = torch.relu(z @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
        return hidden @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

    first, second = e[..., : e.shape[-1] // 2], e[..., e.shape[-1] // 2 :]
    if back:
        second = second - network("G", first)
        return torch.cat([first - network("F", second), second], dim=-1)
    first = first + network("F", second)
    return torch.cat([first, second + network("G", first)], dim=-1)


@each
def test_where_it_sits_and_what_it_holds(family: str) -> None:
    view, method = made(family)
    assert [part.place.path for part in view.get_adapter("a").parts] == PLACES[family][1]
    d, m = 32, 8
    assert view.get_adapter("a").weight.numel() == 2 * d * m + 2 * m + d == sum(p.numel() for p in method.parameters())


@pytest.mark.parametrize("width", [32, 33])
def test_the_inverse_is_exact_to_rounding(width: int) -> None:
    view = get_peft_model(gpt2(n_embd=width, n_head=4 if width == 32 else 3), InvertibleConfig())
    stir(view.adapters, by=0.3)
    method: Any = view.get_adapter("default").parts[0].method
    x = torch.randn(5, 7, width, dtype=torch.float64)
    method.double().requires_grad_(False)
    for there, back in ((method.coupled, method.inverse), (method.inverse, method.coupled)):
        assert float((there(x) - x).abs().max()) > 0.1
        torch.testing.assert_close(back(there(x)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(method.coupled(x), naive(method, x), rtol=0, atol=1e-14)
    torch.testing.assert_close(method.inverse(x), naive(method, x, back=True), rtol=0, atol=1e-14)
    determinant = torch.linalg.det(torch.autograd.functional.jacobian(method.coupled, x[0, 0]))
    torch.testing.assert_close(determinant, torch.ones_like(determinant), rtol=0, atol=1e-12)  # NICE keeps volumes


def by_hand(base: Any, method: Any, paths: list[str]) -> None:
    """Puts f into the base itself by hooks: behind its embeddings, and before its head."""
    for module in map(base.get_submodule, paths):
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _given, y: naive(method, y))
        else:
            module.register_forward_pre_hook(lambda _module, given: (naive(method, given[0], back=True),))


@each
def test_it_is_the_base_with_f_behind_the_embedding_and_its_inverse_before_the_head(family: str) -> None:
    view, method = made(family)
    base = PLACES[family][0]()
    plain = logits(base)
    by_hand(base, method, PLACES[family][1])
    torch.testing.assert_close(logits(view), logits(base), rtol=1e-5, atol=1e-6)
    assert float((logits(view) - plain).detach().abs().max()) > 1e-3


@each
def test_it_starts_as_the_base_and_a_first_step_moves_it(family: str) -> None:
    base = PLACES[family][0]()
    before = logits(base)
    view = get_peft_model(base, InvertibleConfig())
    assert torch.equal(logits(view), before)
    logits(view).pow(2).sum().backward()
    moved = {n for n, p in view.named_parameters() if p.requires_grad and p.grad is not None and bool(p.grad.any())}
    assert {n.split(".", 3)[-1].split("invertible.")[-1] for n in moved} == {
        f"{net}.2.{kind}" for net in "FG" for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert-masked", "t5"])
def test_the_gradients_of_all_places_are_added(family: str) -> None:
    """The whole gradient is the sum of those with one place at a time cut off from it."""
    view, method = made(family)
    view.double()
    names = [n for n, _ in method.named_parameters()]
    parts = [part.method for part in view.get_adapter("a").parts]

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(logits(view).pow(2).sum(), list(method.parameters())))

    whole = gradient()
    total = [torch.zeros_like(g) for g in whole]
    for here in parts:
        forwards = {}
        for other in parts:
            if other is not here:
                forwards[other] = other.forward
                other.forward = cut(other.forward, method)  # type: ignore[method-assign]
        mine = gradient()
        assert all(float(g.abs().max()) > 0 for g in mine)
        total = [t + g for t, g in zip(total, mine, strict=True)]
        for other, forward in forwards.items():
            other.forward = forward
    for name, one, other in zip(names, total, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def cut(forward: Any, method: nn.Module) -> Any:
    """`forward` of one place, computed with copies of the parameters, which the gradient does not see."""

    def call(x: Tensor, base: Any) -> Tensor:
        kept = dict(method.named_parameters())
        for name, p in kept.items():
            owner, _, last = name.rpartition(".")
            setattr(method.get_submodule(owner), last, nn.Parameter(p.detach().clone(), requires_grad=False))
        try:
            return forward(x, base)
        finally:
            for name, p in kept.items():
                owner, _, last = name.rpartition(".")
                setattr(method.get_submodule(owner), last, p)

    return call


BESIDE = {
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "lora": LoraConfig(r=4, target_modules=r".*(embed_tokens|wte|lm_head|q_proj|c_attn|\.q)", init_lora_weights=False),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_beside_others_generation_with_a_cache_is_generation_without(family: str, beside: str) -> None:
    wide = {"initializer_factor": 2.0} if family == "t5" else {"initializer_range": 0.3}
    base = PLACES[family][0](tie_word_embeddings=False, **wide)
    view = get_peft_model(base, InvertibleConfig(), adapter_name="a")
    view.add_adapter("b", BESIDE[beside])
    stir(view.adapters, by=0.3)
    tokens = ids()
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "min_new_tokens": 5}
    options["do_sample"] = False
    found = {}
    for node in ("b >> a", "b", "a + b"):
        found[node] = view.generate(tokens, adapters=node, **options)
        assert torch.equal(found[node], view.generate(tokens, adapters=node, use_cache=False, **options)), node
    assert not torch.equal(found["b >> a"], found["b"])


def test_a_prompt_is_not_changed_by_it() -> None:
    """Virtual tokens stand in the place of what f gives, so that they mean the same with f and without."""
    view, method = made("llama")
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    embeds = naive(method, view.base.get_input_embeddings()(ids()))
    prompt: Tensor = view.get_adapter("prompt").parts[0].method.prompt()  # type: ignore[operator]
    whole = torch.cat([prompt.expand(3, -1, -1), embeds], dim=1)
    states = view.base.model(inputs_embeds=whole).last_hidden_state[:, 2:]
    expected = view.base.lm_head(naive(method, states, back=True))
    torch.testing.assert_close(logits(view, adapters="prompt >> a"), expected, rtol=1e-5, atol=1e-6)


def test_one_upon_the_other_inverts_in_the_opposite_order() -> None:
    view, a = made("llama")
    view.add_adapter("b", InvertibleConfig(non_linearity="relu", reduction_factor=4))
    stir(view.get_adapter("b"), seed=5, by=0.3)
    b = view.get_adapter("b").parts[0].method
    base = view.base
    embeds = naive(b, naive(a, base.get_input_embeddings()(ids())))
    states = base.model(inputs_embeds=embeds).last_hidden_state
    expected = base.lm_head(naive(a, naive(b, states, back=True), back=True))
    torch.testing.assert_close(logits(view, adapters="a >> b"), expected, rtol=1e-5, atol=1e-6)


def test_a_language_adapter_is_both_in_one_folder(tmp_path: Path) -> None:
    config = BottleneckConfig(reduction_factor=2, inv_adapter="nice", inv_adapter_reduction_factor=4)
    view = get_peft_model(masked(), config, adapter_name="en")
    stir(view.adapters, by=0.3)
    kinds = [type(part.method).__name__ for part in view.get_adapter("en").parts]
    assert kinds == ["Bottleneck", "Bottleneck", "Invertible", "Invertible"]
    view.save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "en").glob("*.safetensors")) == ["adapter_model.safetensors"]
    again = PeftModel.from_pretrained(masked(), tmp_path)
    assert torch.equal(logits(again), logits(view))


def test_trained_with_a_head_it_loads_where_there_is_none(tmp_path: Path) -> None:
    """A language adapter comes from masked language modelling and goes under a classifier of the same body."""
    view = get_peft_model(masked(), BottleneckConfig(bottleneck_size=4, inv_adapter="nice"), adapter_name="en")
    stir(view.adapters, by=0.3)
    view.save_pretrained(tmp_path)
    base = bert()
    base.bert.load_state_dict(view.base.bert.state_dict(), strict=False)
    with pytest.warns(UserWarning, match="other modules or shapes"):
        classifier = PeftModel.from_pretrained(base, tmp_path)
    states = [model(ids(), output_hidden_states=True).hidden_states[-1] for model in (view, classifier)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="base_model gives hidden states, without the head"):
        view.base_model(ids())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_checkpointing_changes_no_gradient(family: str, reentrant: bool) -> None:
    view, _ = made(family)
    expected = gradients_of(view.train())
    recompute(view, reentrant)
    same_gradients(gradients_of(view), expected)


def gradients_of(view: PeftModel) -> dict[str, Tensor | None]:
    loss(view).backward()
    return gradients(view)


def test_half_precision_computes_f_in_the_adapters_own() -> None:
    base = llama().bfloat16()
    view = get_peft_model(base, InvertibleConfig())
    stir(view.adapters, by=0.3)
    method: Any = view.get_adapter("default").parts[0].method
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    embeds = naive(method, base.get_input_embeddings()(ids()).float()).bfloat16()
    states = base.model(inputs_embeds=embeds).last_hidden_state
    expected = base.lm_head(naive(method, states.float(), back=True).bfloat16())
    found = logits(view)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "images": (lambda: get_peft_model(vit(), InvertibleConfig()), "ViTPatchEmbeddings makes the input"),
    "a head that is copied, too": (
        lambda: get_peft_model(llama(), InvertibleConfig(modules_to_save=["lm_head"])),
        r"\['lm_head'\] are in modules_to_save",
    ),
    "the same beside a bottleneck": (
        lambda: get_peft_model(llama(), BottleneckConfig(inv_adapter="nice", modules_to_save=["embed_tokens"])),
        r"\['model.embed_tokens'\] are in modules_to_save",
    ),
    "a head of another width": (lambda: get_peft_model(narrow_head(), InvertibleConfig()), "as many features"),
    "a factor of nothing": (lambda: InvertibleConfig(reduction_factor=0), "must be above 0"),
    "another coupling": (lambda: BottleneckConfig(inv_adapter="glow"), "'glow' is not one of None, 'nice'"),
    "a factor without effect": (
        lambda: BottleneckConfig(inv_adapter_reduction_factor=2),
        "no effect without inv_adapter",
    ),
}


def narrow_head() -> Any:
    base = opt()
    base.set_output_embeddings(nn.Linear(16, VOCABULARY))
    return base


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_merging_is_refused() -> None:
    view, _ = made("llama")
    with pytest.raises(TypeError, match=r"Invertible at 'model\.embed_tokens' is no map of weights"):
        view.merge_adapter()
