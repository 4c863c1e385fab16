"""Every map of weights at fused experts, (E, O, I), and at a router's matrix: as at E linear layers, or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GptOssConfig, GptOssForCausalLM

from coadapt import LoraConfig, OFTConfig, PeftModel, VeraConfig
from coadapt.config import PeftConfig
from coadapt.core.adapter import ModuleCopy
from coadapt.core.experts import Experts
from coadapt.core.method import METHODS, ModuleMethod, WeightMethod
from coadapt.core.parameter import methods_at
from laws.setting import EVERY, close, far, gradients, ids, logits, loss, same_gradients, stir
from models import mixtral

WORDS = ["experts", "router"]
REFUSED = {
    "a-lora": "ALoRA cannot adapt .* it is no map of weights",
    "beft": "names parameters that are no layers",
    "bitfit": "names parameters that are no layers",
    "ln-tuning": "names parameters that are no layers",
    "lily": "names parameters that are no layers",
    "glora-bias": "none of the layers concerned has a bias",
    "lora-bias": "none of the layers concerned has a bias",
    "lora-own-bias": "LoraBias adapts layers of these kinds",
    "monteclora": "MonteCLoRA cannot adapt .* it draws what it adds in each call",
    "pvera": "PVeRA cannot adapt .* it draws what it adds in each call",
    "tokens": "names parameters that are no layers",
    "velora": "VeLoRA cannot adapt .* it changes what a call keeps for its backward",
}
"""What needs a layer, and what is said of it."""
APART = ("frod", "tinylora", "unilora", "unilora-saved")
"""Cases whose experts differ in more than values: the place of each in a bank, say. They are taken one by one."""
CASES = [
    case
    for case, c in EVERY.items()
    if case not in ("lora-tied", "lora-tokens") and (case in REFUSED or issubclass(METHODS[c.method], WeightMethod))
]


def config_of(case: str) -> PeftConfig:
    config: Any = replace(EVERY[case], target_modules=WORDS)
    if case == "bd-lora":
        config = replace(config, use_bdlora={"target_modules_bd_a": ["down"], "nblocks": 2, "match_strict": False})
    return replace(config, target_parameters=None) if case.endswith("-experts") else config


def view_with(**adapters: PeftConfig) -> PeftModel:
    view = PeftModel(mixtral())
    for i, (name, config) in enumerate(adapters.items()):
        torch.manual_seed(i)
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i)
    view.set_adapter(list(adapters))
    return view.eval()


def by_definition(view: PeftModel, name: str = "a") -> dict[str, Tensor]:
    """The parameters that an adapter changes, expert by expert."""
    made: dict[str, Tensor] = {}
    for path in dict.fromkeys(part.place.site for part in view.get_adapter(name).parts):
        parts = [part for part in view.get_adapter(name).parts if part.place.site == path]
        weight = view.base.get_parameter(path).detach()
        methods: list[Any] = [part.method for part in parts]
        whole = parts[0].place.expert is None
        made[path] = (
            methods[0].merge(weight) if whole else torch.stack([m.merge(weight[e]) for e, m in enumerate(methods)])
        )
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_map_of_weights_is_one_for_each_expert_or_refused(case: str, tmp_path: Path) -> None:
    if case in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[case]):
            PeftModel(mixtral(), config_of(case))
        return
    view = view_with(a=config_of(case))
    base: Any = view.base
    plain, before = logits(base), {n: p.clone() for n, p in base.named_parameters()}
    slow = by_definition(view)
    assert {path.rpartition(".")[2] for path in slow} == {"gate_up_proj", "down_proj", "weight"}
    expected = functional_call(base, slow, (), {"input_ids": ids()}).logits
    far(expected, plain)
    out = logits(view)
    close(out, expected)
    loss(view).backward()
    fast = gradients(view)
    weighed = (expected * torch.linspace(-1, 1, expected.shape[-1])).pow(2).sum() / len(expected)
    weighed.backward()
    same_gradients(fast, gradients(view), 1e-4)
    view.merge_adapter()
    close(logits(base), expected)
    view.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    view.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(mixtral(), tmp_path / "a")), out)


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_experts_that_are_alike_are_one_call(case: str) -> None:
    parts = [p for p in view_with(a=config_of(case)).get_adapter("a").parts if p.place.parameter == "down_proj"][:4]
    (method,) = methods_at(parts[:4] if parts[0].place.expert is not None else parts[:1])
    assert isinstance(method, Experts) == (METHODS[EVERY[case].method].kinds[-1] != "experts")
    assert not isinstance(method, Experts) or method.alike == (case not in APART)


def test_what_differs_is_not_taken_for_alike() -> None:
    pattern = {r"down_proj\[1\]": 5.0}
    view = view_with(a=LoraConfig(r=2, use_dora=True, target_modules="experts", alpha_pattern=pattern))
    other = view_with(a=LoraConfig(r=2, use_dora=True, target_modules="experts"))
    other.get_adapter("a").load_state_dict(view.get_adapter("a").state_dict())
    for path, made in by_definition(view).items():
        (here,) = {part.place.module for part in view.get_adapter("a").parts if part.place.site == path}
        weight = here.get_parameter(path.rpartition(".")[2])
        found = methods_at([p for p in view.get_adapter("a").parts if p.place.site == path])
        close(found[0].merge(weight), made)  # type: ignore[operator]
    far(logits(view), logits(other))


def test_patterns_name_all_experts_or_one(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, use_dora=True, target_modules="experts", rank_pattern={r"down_proj\[3\]": 3, "down_proj": 4}
    )
    view = view_with(a=config)
    ranks = {p.place.path[-12:]: p.method.change.A.shape[0] for p in view.get_adapter("a").parts[-4:]}  # type: ignore[union-attr]
    assert list(ranks.values()) == [4, 4, 4, 3]
    view.save_pretrained(tmp_path)  # down_proj's tensors one by one
    close(logits(PeftModel.from_pretrained(mixtral(), tmp_path / "a")), logits(view))


def test_several_kinds_at_one_parameter_add_up_and_follow_one_another() -> None:
    experts = {"target_modules": "experts"}
    view = view_with(
        a=LoraConfig(r=2, init_lora_weights=False, **experts),
        b=OFTConfig(oft_block_size=2, use_cayley_neumann=False, **experts),
        c=VeraConfig(r=4, **experts),
    )
    base: Any = view.base
    before = {path: base.get_parameter(path).detach() for path in by_definition(view)}
    made = {name: by_definition(view, name) for name in "abc"}
    summed = {p: w + made["a"][p] - w + 0.5 * (made["b"][p] - w) + (made["c"][p] - w) for p, w in before.items()}
    expected = functional_call(base, summed, (), {"input_ids": ids()}).logits
    close(logits(view, adapters="a + 0.5*b + c"), expected, 1e-5)
    far(logits(view, adapters="a >> b"), logits(view, adapters="b >> a"))
    rows = [["a"], ["b >> a"], ["a + c"]]
    mixed = logits(view, adapter_names=[row[0] for row in rows])
    for i, (row,) in enumerate(rows):
        close(mixed[i : i + 1], logits(view, ids()[i : i + 1], adapters=row), 1e-5)


def test_experts_that_are_stored_as_inputs_by_outputs() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    base: Any = GptOssForCausalLM(GptOssConfig(vocab_size=64, pad_token_id=0, **sizes, **heads)).eval()
    view = PeftModel(base, LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules="experts"))
    parts = [p for p in view.get_adapter("default").parts if p.place.parameter == "down_proj"][:4]
    weight = base.model.layers[0].mlp.experts.down_proj.detach()  # (E, I, O)
    assert [part.place.layer.shape for part in parts] == [(32, 48)] * 4
    view.merge_adapter()
    methods: list[Any] = [part.method for part in parts]
    close(
        base.model.layers[0].mlp.experts.down_proj,
        torch.stack([m.merge(weight[e].mT).mT for e, m in enumerate(methods)]),
    )


def test_trained_gates_have_one_place_at_a_parameter() -> None:
    view = view_with(a=config_of("oft-experts"), b=config_of("vera-experts"))
    for node in ("learned*a + b", "learned_per_layer*a + b"):
        view.set_adapter(node)
        loss(view).backward()
        found = gradients(view)
        assert all(g is not None for g in found.values())
        gates = {name: g for name, g in found.items() if not name.startswith("adapters.")}
        assert sum(g.numel() for g in gates.values() if g is not None) == (2 if "per_layer" in node else 1)


def test_experts_of_unlike_ranks_become_one_lora() -> None:
    pattern = {r"down_proj\[1\]": 3}
    view = view_with(
        a=LoraConfig(r=2, kasa_config={}, target_modules="experts", rank_pattern=pattern), b=config_of("lora")
    )
    view.combine("a + 0.5*b", adapter_name="one")
    close(logits(view, adapters="one"), logits(view, adapters="a + 0.5*b"), 1e-5)


def test_files_hold_one_tensor_for_all_experts_and_say_that_peft_cannot_read_them(tmp_path: Path) -> None:
    from safetensors import safe_open

    view = view_with(default=config_of("oft-experts"))
    view.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {
            key.removeprefix("base_model.model.model.layers.0.mlp."): file.get_slice(key).get_shape()
            for key in file.keys()
        }
    assert shapes["experts.down_proj.oft_R.weight"] == [4, 24, 1]
    assert shapes["gate.weight.oft_R.weight"] == [16, 1]
    assert '"readable_by_peft": false' in (tmp_path / "adapter_config.json").read_text()


def test_dropout_is_refused_at_parameters() -> None:
    for config in (
        LoraConfig(target_modules="experts", lora_dropout=0.1),
        OFTConfig(target_modules="router", module_dropout=0.1),
    ):
        with pytest.raises(ValueError, match=r"dropout would have no effect on 'model\.layers\.0"):
            PeftModel(mixtral(), config)


class Mixture(nn.Module):
    """A router, a list of experts that are linear layers, and an expert that all tokens go through."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(4)])
        self.shared_experts = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return x + self.shared_experts(x) + (outputs * weights[..., None, :]).sum(-1)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Mixture(), Mixture()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


LISTED = [
    case
    for case, config in EVERY.items()
    if issubclass(METHODS[config.method], WeightMethod | ModuleMethod | ModuleCopy)
    and (
        case not in REFUSED
        or case
        in ("beft", "bitfit", "glora-bias", "lily", "monteclora", "pvera", "velora", "lora-bias", "lora-own-bias")
    )
    and hasattr(config, "target_modules")
    and not case.endswith(("-stream", "-parallel", "-tokens"))
    and not case.startswith(("reft", "shadow"))
    and case not in ("lora-tied", "language", "compacter-whole")  # whole blocks of transformers' models
]


@pytest.mark.parametrize("word", ["experts", "shared_experts"])
@pytest.mark.parametrize("case", LISTED)
def test_experts_in_a_list_are_layers_to_every_method(case: str, word: str) -> None:
    options: dict[str, Any] = {"target_parameters": None} if case.endswith("-experts") else {}
    if case == "bd-lora":
        options["use_bdlora"] = {"target_modules_bd_a": ["0"], "nblocks": 2, "match_strict": False}
    view = PeftModel(Listed(), replace(EVERY[case], target_modules=[word], **options)).eval()
    stir(view.adapters, by=0.3)
    paths = [part.place.path for part in view.get_adapter("default").parts]
    assert paths
    x = torch.randn(2, 3, 16)
    far(view(x), view.base(x))
    assert {path.split(".")[2] for path in paths} == {word}
