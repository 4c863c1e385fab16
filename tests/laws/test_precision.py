"""Half precision bases with adapters in full precision, and autocast, are as exact as their bases are."""

from dataclasses import replace

import pytest
import torch

from coadapt import LoraConfig, PeftModel
from coadapt.core.precision import scaled
from laws.setting import EVERY, MAKE, attach, close, far, gradients, ids, logits, loss, pairs, rest, view_on

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def no_worse(
    adapted: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, base_exact: torch.Tensor, times: float = 4.0
) -> None:
    """The adapted model's rounding error is that of its base, times a few."""
    allowed = times * (base.float() - base_exact).detach().abs().max()
    allowed = allowed + torch.finfo(adapted.dtype).eps * exact.detach().abs().max()
    assert float((adapted.float() - exact).detach().abs().max()) <= float(allowed)


@HALF
@pairs(3)
def test_a_half_base_with_full_adapters(case: str, model: str, dtype: torch.dtype) -> None:
    every = {"num_experts_per_tok": 4} if model == "mixtral" else {}  # or rounding sends tokens to other experts
    base = MAKE[model](**every).to(dtype)
    exact = MAKE[model](**every)
    exact.load_state_dict(base.state_dict())
    half, full = attach(base, model, case, "lora"), attach(exact, model, case, "lora")
    assert {p.dtype for p in half.adapters.parameters()} == {torch.float32}
    one, other = logits(half), logits(full)
    assert one.dtype == logits(base).dtype
    if case.endswith("tokens"):
        # The rows that are trained are ten times as large as the base's, and with them what rounding does to hidden
        # states and scores: the measure is a base in half precision that has these very weights, merged.
        merged = MAKE[model](**every)
        merged.load_state_dict(base.state_dict())
        merged = attach(merged, model, case, "lora").merge_and_unload()
        expected = logits(merged)
        no_worse(one, other, logits(merged.to(dtype)), expected, times=2)
    else:
        no_worse(one, other, logits(base), logits(exact))
    far(one.float(), logits(base).float())
    loss(half).backward()
    loss(full).backward()
    theirs = gradients(full)
    for name, gradient in gradients(half).items():
        expected = theirs[name]
        assert gradient is not None
        assert expected is not None
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all(), name
    whole = torch.cat([g.flatten() for g in theirs.values() if g is not None])
    assert float(whole.norm()) > 0


@HALF
@pairs(4)
def test_rows_and_gates_in_half_precision(case: str, model: str, dtype: torch.dtype) -> None:
    view = attach(MAKE[model]().to(dtype), model, case, "lora")
    mixed = logits(view, adapter_names=["a", None, "a + 0.5*b"])
    assert mixed.dtype == logits(view.base).dtype
    for b, node in enumerate(["a", [], "a + 0.5*b"]):
        close(mixed[b].float(), logits(view, ids()[b : b + 1], adapters=node)[0].float(), 3e-2)


SERIAL, PARALLEL, ROWS = ["a", "b", "a"], ["a + 0.5*b"], [["a", None, "b"]]
MODES = {"serial": SERIAL, "parallel": PARALLEL, "rows": ROWS}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("cases", [("lora", "bottleneck"), ("prompt", "prefix"), ("dora", "ia3")])
@pytest.mark.parametrize("model", ["llama", *rest("gpt2", "t5", "bart")])
def test_gradients_of_several_adapters_are_those_of_full_precision(
    model: str, cases: tuple[str, str], autocast: bool, mode: str
) -> None:
    """As far as bf16 carries, whose steps are 1/256, for each adapter as a whole."""

    def found(half: bool) -> dict[str, torch.Tensor]:
        base = MAKE[model]()
        base.load_state_dict({k: v.bfloat16().float() for k, v in base.state_dict().items()})
        view = attach(base, model, *cases, by=0.3).train()
        if half and not autocast:
            base.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=half and autocast):
            outs = [
                logits(view, **({"adapter_names": node} if isinstance(node, list) else {"adapters": node})).float()
                for node in MODES[mode]
            ]
        torch.stack(outs).sum(0).square().mean().backward()  # through all forwards at once
        return {n: torch.cat([p.grad.flatten() for p in view.get_adapter(n).parameters()]) for n in "ab"}  # type: ignore[union-attr]

    exact, half = found(False), found(True)
    for name, gradient in half.items():
        assert gradient.dtype == torch.float32
        # T5 has ReLUs, which tip over at a rounding, and scores of any size; what is lost or doubled is off by 0.5.
        allowed = 0.15 if model in ("t5", "bart") else 0.06
        assert float((gradient - exact[name]).norm() / exact[name].norm()) < allowed, name


@pairs(5)
def test_autocast(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    exact, base_exact = logits(view), logits(view.base)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        adapted, base = logits(view), logits(view.base)
        loss(view.train()).backward()
    assert adapted.dtype == base.dtype
    no_worse(adapted, exact, base, base_exact, 8.0 if case == "shadow-deep" else 4.0)  # which has a stack of its own
    for name, gradient in gradients(view).items():
        assert gradient is not None, name
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all(), name


def test_adapters_may_be_half_if_asked() -> None:
    view = PeftModel(MAKE["llama"]().bfloat16(), LoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in view.adapters.parameters()} == {torch.bfloat16}
    assert logits(view).dtype == torch.bfloat16


def test_a_double_base_has_double_adapters() -> None:
    view = attach(MAKE["gpt2"]().double(), "gpt2", "lora", "prefix", "bottleneck", "prompt")
    assert {p.dtype for p in view.adapters.parameters()} == {torch.float64}
    assert logits(view).dtype == torch.float64
    single = view_on("gpt2", "lora", "prefix", "bottleneck", "prompt")
    single.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in view.state_dict().items()})
    close(logits(view).float(), logits(single), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gates_of_joint_prefixes_in_any_dtype(dtype: torch.dtype) -> None:
    """A prefix that some rows do not use has the lowest score of the dtype there."""
    view = attach(MAKE["llama"]().to(dtype), "llama", "prefix")
    mixed = logits(view, ids(2), adapter_names=["a", None])
    within = {torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    close(mixed[0], logits(view, ids(2)[:1])[0], within)
    close(mixed[1], logits(view.base, ids(2)[1:])[0], within)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_not_rounded(dtype: torch.dtype) -> None:
    """y * factors is as near to float64 as half precision can be, and so are the gradients, summed as they are."""
    torch.manual_seed(0)
    y = torch.randn(40, 30, dtype=dtype, requires_grad=True)
    factors = torch.cat([torch.ones(10) + 1e-3 * torch.randn(10), torch.randn(10), 1e-3 * torch.randn(10)])
    factors.requires_grad_()
    exact = y.double() * factors.double()
    found = scaled(y, factors)
    assert found.dtype == dtype
    half_a_step = 0.5 * torch.finfo(dtype).eps * exact.abs()
    assert bool(((found - exact).abs() <= 1.01 * half_a_step + 1e-7).all())
    chosen = torch.randn(40, 30).to(dtype)
    gradients = torch.autograd.grad(found, (y, factors), chosen)
    assert gradients[1].dtype == torch.float32
    for one, other in zip(gradients, torch.autograd.grad(exact, (y, factors), chosen.double()), strict=True):
        assert float((one - other).norm() / other.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("case", ["ia3", "dora"])
def test_small_steps_show_beside_a_base_in_half_precision(case: str) -> None:
    """Factors that train at 1.003, which is 1 in bf16: the outputs follow, as far as they can be told apart."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 20, bias=False, dtype=torch.bfloat16)
    config = replace(EVERY[case], target_modules=["0"], **({"init_lora_weights": True} if case == "dora" else {}))
    view = PeftModel(torch.nn.Sequential(layer), config)
    factors = next(p for n, p in view.get_adapter("default").named_parameters() if n.endswith((".m", ".l")))
    x = torch.randn(500, 30, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = layer(x).float()
        assert torch.equal(view(x).float(), plain)
        factors.mul_(1.003)
        step = ((view(x).float() - plain) * plain).sum() / plain.square().sum()
    assert 0.002 < float(step) < 0.004
