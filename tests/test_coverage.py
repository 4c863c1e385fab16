"""What is said of a model, by role and by method, is what is there and what attaching does."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

import models
from coadapt import BottleneckConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.core import coverage
from coadapt.core.layer import kind_of
from coadapt.core.mixture import mixtures
from coadapt.core.roles import blocks
from coadapt.training.inspect import coverage_tables, layers_table
from laws.setting import CASES, MAKE, fits

SAID: dict[str, dict[str, int]] = {
    "llama": {"attention query": 2, "attention output": 2, "feed-forward first": 2, "feed-forward, other": 2},
    "gpt2": {"attention fused q, k, v": 2, "attention output": 2, "embedding": 2, "prefix site: decoder": 2},
    "bloom": {"attention fused q, k, v": 2, "feed-forward last": 2, "input: decoder": 1},
    "bert": {"prefix site: encoder": 2, "linear, other": 1, "head": 1, "embedding": 3},
    "whisper": {"prefix site: encoder": 2, "prefix site: decoder": 2, "prefix site: cross": 2, "input: encoder": 0},
    "bart": {"attention key": 6, "feed-forward last": 4, "prefix site: cross": 2, "input: encoder": 1},
    "vit": {"convolution": 1, "prefix site: encoder": 2, "head": 1},
    "mixtral": {"experts": 2, "router": 2, "attention value": 2, "norm": 5},
    "conv": {"convolution": 2, "linear, other": 2, "norm": 1},
}


@pytest.mark.parametrize("model", MAKE)
def test_every_layer_has_one_role(model: str) -> None:
    base = MAKE[model]()
    roles = coverage.roles(base)
    said = [path for role in roles if not role.name.startswith(("prefix site", "input")) for path in role.paths]
    assert len(said) == len(set(said))
    assert {p for p, m in base.named_modules() if kind_of(m) is not None} <= set(said)
    owners = {n.rpartition(".")[0] for n, p in base.named_parameters() if p.dim() > 1}
    assert owners - set(said) <= {"vit.embeddings"}, "every matrix is in what is said; ViT's class token is none"
    counts = {role.name: len(role.paths) for role in roles}
    assert {name: counts[name] for name in SAID.get(model, {})} == SAID.get(model, {})


@pytest.mark.parametrize("model", MAKE)
def test_a_method_has_the_places_that_are_said_or_none_for_the_reason_that_is_said(model: str) -> None:
    base = MAKE[model]()
    found = {fit.method: fit for fit in coverage.fits(base)}
    assert found.keys() == {config.method for config in CASES.values()}
    for case, config in CASES.items():
        fit, tried = found[config.method], coverage.usual(type(config))
        assert bool(fit.paths) != bool(fit.why)
        assert fits(case, model) or not fit.paths
        if fit.paths:
            try:
                view = PeftModel(base, tried)
            except ValueError:  # its default sizes are for wider models
                view = PeftModel(base, config)
            assert {p.place.path for p in view.get_adapter("default").parts} == set(fit.paths)
            view.unload()
        else:
            with pytest.raises(ValueError) as caught:
                PeftModel(base, tried if tried.method == config.method else config)
            assert str(caught.value) == fit.why


def test_tables_count_every_parameter_and_name_what_is_left_out() -> None:
    with torch.device("meta"):
        base = models.mixtral()
    text = io.StringIO()
    out = Console(file=text, width=160)
    out.print(layers_table(base))
    for table in coverage_tables(base):
        out.print(table)
    lines = text.getvalue().splitlines()
    last = [line.split()[-1].replace(",", "") for line in lines[2 : lines.index("") if "" in lines else None]]
    numbers = [int(n) for n in last if n.isdigit()]
    assert sum(numbers) == sum(p.numel() for p in base.parameters())
    experts = next(line for line in lines if line.startswith("experts "))
    assert "gate_up_proj, down_proj" in experts


def test_all_linear_says_which_experts_it_leaves_out() -> None:
    base = models.mixtral()
    with pytest.warns(UserWarning, match=r"found 8 layers \(q_proj, k_proj, v_proj, o_proj\).*experts of 2 mixtures"):
        view = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    ends = {p.place.path.rpartition(".")[2] for p in view.get_adapter("default").parts}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_mixture_is_one_feed_forward_part_beside_nothing_else() -> None:
    base = models.mixtral()
    assert [m.path for m in mixtures(base)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert {m.width for m in mixtures(base)} == {32}
    for block in blocks(base):
        assert block.feed_forward is not None
        assert (
            block.feed_forward[0] == block.feed_forward[1] == (f"{block.path}.mlp", base.get_submodule(block.path).mlp)
        )
    layer: Any = base.model.layers[1]
    layer.beside = torch.nn.Linear(32, 32)
    assert blocks(base)[1].feed_forward is None
    with pytest.raises(ValueError, match=r"'model\.layers\.1' .*name target_modules"):
        PeftModel(base, CASES["bottleneck"])


class Experts(torch.nn.Module):
    """A block as it was before experts were fused: a list of them, and a router that is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 3, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 5)) for _ in range(3))


class OwnAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)


def test_experts_in_a_list_are_a_mixture_too() -> None:
    base = torch.nn.Module()
    block = torch.nn.Module()
    block.attention, block.moe = OwnAttention(), Experts()
    base.layers = torch.nn.ModuleList([block])
    (mixture,) = mixtures(base)
    assert (mixture.path, mixture.experts) == ("layers.0.moe", "layers.0.moe.experts")
    assert (mixture.router, mixture.raw, mixture.width) == ("layers.0.moe.gate", (), 8)
    (found,) = blocks(base)
    assert found.feed_forward == (("layers.0.moe", block.moe),) * 2
    roles = {role.name: role.paths for role in coverage.roles(base)}
    assert roles["router"] == ("layers.0.moe.gate",)
    assert len(roles["experts"]) == 3
    view = PeftModel(base, LoraConfig(target_modules="all-linear"))  # every layer is one, so nothing is left to say
    assert len(view.get_adapter("default").parts) == 6


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a prompt before images": ("vit", PromptTuningConfig(num_virtual_tokens=2), "ViTPatchEmbeddings makes the input"),
    "a prompt before sounds": (
        "whisper",
        PromptTuningConfig(num_virtual_tokens=2, prompt_sites=["encoder"]),
        r"has \['decoder'\]. Its encoder has no tokens: Conv1d",
    ),
    "a router": ("mixtral", LoraConfig(target_modules=["gate"]), "'model.layers.0.mlp.gate' is a MixtralTopKRouter"),
    "a bottleneck behind a convolution": (
        "conv",
        BottleneckConfig(target_modules=["second"]),
        "features do not stand last",
    ),
    "a list of modules": (
        "llama",
        BottleneckConfig(target_modules=["layers"]),
        "'model.layers' is a ModuleList, which nothing calls",
    ),
    "a prefix without attention": ("conv", CASES["prefix"], "no attention that a prefix could join"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_is_refused(what: str) -> None:
    model, config, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        get_peft_model(MAKE[model](), config)
