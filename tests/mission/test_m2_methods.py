"""M2: the four methods, against what they are by hand and against published parameter counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from coadapt import (
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from coadapt.core.plan import Plan
from models import (
    bart,
    bert,
    bloom,
    conv,
    gemma2,
    gemma3,
    gpt2,
    ids,
    llama,
    logits,
    mixtral,
    opt,
    qwen2,
    qwen3,
    stir,
    t5,
    vit,
    whisper,
)
from steps import error, flat

ENDS: dict[Any, tuple[tuple[str, ...], str, str]] = {
    llama: (("o_proj",), "gate_proj", "down_proj"),
    gpt2: (("attn.c_proj",), "c_fc", "mlp.c_proj"),
    bloom: (("self_attention.dense",), "dense_h_to_4h", "dense_4h_to_h"),
    t5: (("Attention.o",), "wi", "wo"),
    bert: (("attention.output.dense",), "intermediate.dense", r"\d.output.dense"),
    opt: (("out_proj",), "fc1", "fc2"),
    bart: (("out_proj",), "fc1", "fc2"),
    whisper: (("out_proj",), "fc1", "fc2"),
    vit: (("o_proj",), "fc1", "fc2"),
    gemma2: (("o_proj",), "gate_proj", "down_proj"),
    gemma3: (("o_proj",), "gate_proj", "down_proj"),
    qwen2: (("o_proj",), "gate_proj", "down_proj"),
    qwen3: (("o_proj",), "gate_proj", "down_proj"),
    mixtral: (("o_proj",), "mlp", "mlp"),
}
"""Where attention ends, where the feed-forward part begins, and where it ends."""


def bottleneck(method: Any, x: Tensor) -> Tensor:
    return method.up(torch.relu(method.down(x)))


def by_hand(base: nn.Module, view: PeftModel, parallel: bool) -> list[str]:
    """Puts the adapters of `view` into `base` by hooks; returns the modules that they sit at."""
    noted: dict[str, Tensor] = {}
    paths = []
    for part in view.get_adapter("default").parts:
        method, path = part.method, part.place.path
        first = part.place.reads[0] if part.place.reads else path
        if parallel:
            base.get_submodule(first).register_forward_pre_hook(lambda _, args, p=path: noted.__setitem__(p, args[0]))
        base.get_submodule(path).register_forward_hook(
            lambda _, args, y, m=method, p=path: y + bottleneck(m, noted[p] if parallel else y)
        )
        paths.append(path)
    return paths


@pytest.mark.parametrize("make", ENDS)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_m2_1_adapters_in_the_published_places(make: Callable[..., Any], placement: str) -> None:
    view = get_peft_model(make(), BottleneckConfig(bottleneck_size=4, placement=placement))
    assert torch.equal(logits(view), logits(make())), "an adapter starts as no change"
    stir(view.adapters, by=0.5)
    base = make()
    paths = by_hand(base, view, placement == "parallel")
    assert error(logits(view), logits(base)) < 1e-6
    assert error(logits(view), logits(make())) > 1e-3
    attention, _, last = ENDS[make]
    two = make in (t5, bart, whisper)
    blocks = 4 if two else 2
    assert sum(p.endswith(last.removeprefix(r"\d")) and not p.endswith(attention) for p in paths) == blocks
    after_attention = 0 if placement != "houlsby" else 6 if two else 2
    assert sum(p.endswith(attention) for p in paths) == after_attention == len(paths) - blocks


@pytest.mark.parametrize("make", [*ENDS, conv])
def test_m2_2_merged_is_a_plain_model_again(make: Callable[..., Any]) -> None:
    """No added latency: after the merge nothing of the adapter runs, modules and keys are the base's."""
    named = {mixtral: ["q_proj", "v_proj", "o_proj", "lm_head"], conv: ["first", "second", "hidden"]}
    targets = named.get(make, "all-linear")
    view = get_peft_model(make(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted = logits(view)
    view.merge_adapter()
    assert error(logits(view), adapted) < 1e-5
    view.unmerge_adapter()
    assert torch.equal(logits(view), adapted)
    assert torch.equal(flat(view.get_base_model().parameters()), flat(make().parameters()))
    merged = view.merge_and_unload()
    assert error(logits(merged), adapted) < 1e-5
    assert [type(m) for m in merged.modules()] == [type(m) for m in make().modules()]
    assert list(merged.state_dict()) == list(make().state_dict())
    assert error(logits(make()), adapted) > 1e-3


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


def llama_7b() -> Any:
    return on_meta(LlamaForCausalLM, LlamaConfig())  # the defaults are that model's


def bloomz_560m() -> Any:
    return on_meta(BloomForCausalLM, BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16))


def test_m2_2_parameter_share_of_llama_7b(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures that everybody has seen for rank 8 on queries and values."""
    view = get_peft_model(llama_7b(), LoraConfig(r=8))
    assert view.get_nb_trainable_parameters() == (4_194_304, 6_742_609_920)
    view.print_trainable_parameters()
    assert "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622" in capsys.readouterr().out


def test_m2_3_prefix_share() -> None:
    """Ten vectors for keys and ten for values in each of 32 layers of 4096: under a thousandth."""
    trained, total = get_peft_model(llama_7b(), PrefixTuningConfig(num_virtual_tokens=10)).get_nb_trainable_parameters()
    assert trained == 10 * 2 * 32 * 4096
    assert trained / total < 1e-3


@pytest.mark.parametrize("make", [make for make in ENDS if make is not bloom])
def test_m2_3_prefix_has_the_heads_of_each_layer_s_own_keys(make: Callable[..., Any]) -> None:
    """Narrow heads, few heads of keys, one: a vector of the layer's own width for each key and each value."""
    base = make()
    ends = ("k_proj", "k", "key", "c_attn")
    keys = [m for n, m in base.named_modules() if n.rpartition(".")[2] in ends]
    width = sum(m.weight.shape[1] // 3 if type(m).__name__ == "Conv1D" else m.out_features for m in keys)
    assert len(keys) == (6 if make in (t5, bart, whisper) else 2)
    view = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=5))
    assert view.get_nb_trainable_parameters()[0] == 5 * 2 * width


@pytest.mark.parametrize("make", [make for make in ENDS if make is not vit])
def test_m2_4_prompt_is_as_wide_as_the_input(make: Callable[..., Any]) -> None:
    base = make()
    view = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=8))
    assert view.get_nb_trainable_parameters()[0] == 8 * base.get_input_embeddings().embedding_dim


def test_m2_4_prompt_share_of_bloomz_560m() -> None:
    view = get_peft_model(bloomz_560m(), PromptTuningConfig(num_virtual_tokens=8))
    assert view.get_nb_trainable_parameters() == (8_192, 559_222_784)


@pytest.mark.parametrize("make", [make for make in ENDS if make is not bloom])
def test_m2_5_many_tasks_share_one_base(make: Callable[..., Any]) -> None:
    """Twelve tasks of four methods; each, switched to in any order, gives what it gives alone on its own base."""
    kinds = [
        LoraConfig(r=2),
        BottleneckConfig(bottleneck_size=3),
        PrefixTuningConfig(num_virtual_tokens=2),
        PromptTuningConfig(num_virtual_tokens=2) if make is not vit else BitFitConfig(),
    ]
    base = make()
    pointers = [p.data_ptr() for p in base.parameters()]
    view = get_peft_model(base, kinds[0], adapter_name="task0")
    for i in range(1, 12):
        view.add_adapter(f"task{i}", kinds[i % 4])
    for i in range(12):
        stir(view.get_adapter(f"task{i}"), seed=i)
    trains = [p.requires_grad for p in view.parameters()]
    for i in (7, 0, 11, 4, 4, 2, 9):
        view.set_adapter(f"task{i}")
        single = get_peft_model(make(), kinds[i % 4])
        single.get_adapter("default").load_state_dict(view.get_adapter(f"task{i}").state_dict())
        assert torch.equal(logits(view), logits(single)), i
    assert [p.requires_grad for p in view.parameters()] == trains
    assert [p.data_ptr() for p in base.parameters()] == pointers
    assert torch.equal(logits(base), logits(make()))


def test_m2_5_switching_builds_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back to a task runs the plan that was made for it: sites are not searched again."""
    made: list[Any] = []
    build = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda self, *a, **k: (made.append(a), build(self, *a, **k))[1])
    view = get_peft_model(llama(), LoraConfig(r=2), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=2))
    for name in ("a", "b", "a", "b", "a"):
        view.set_adapter(name)
        logits(view, ids(1))
    assert len(made) == 2
