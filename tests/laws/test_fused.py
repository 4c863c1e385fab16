"""The fused path of products equals its definition, in values and gradients; and it keeps what it says it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import LoraConfig, PeftModel, Sum
from coadapt.core import lowrank
from coadapt.core.fused import Dropped, Product
from laws.setting import close, ids
from models import llama

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("gated", ["number", "tensor"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_first_and_second_derivatives_against_differences(gated: str, dropped: bool, runs: bool) -> None:
    """x, what the layer made of it, B, a gate, A, and the A of another layer that reads the same x."""
    x, y, up, gate, down, other = tensors((2, 3, 5), (2, 3, 4), (4, 2), (6, 2), (2, 5), (3, 5))
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mask = Dropped(x, 0.3) if dropped else None

    def product(*given: Tensor) -> Any:
        x, y, up, gate, down, other = given
        layer = (None, weight, bias) if runs else (y, None, None)
        return Product.apply(x, *layer, up, gate if gated == "tensor" else 0.7, None, mask, down, other)

    assert torch.autograd.gradcheck(product, (x, y, up, gate, down, other))
    assert torch.autograd.gradgradcheck(product, (x, y, up, gate, down, other))


def test_factors_of_each_row_against_differences() -> None:
    x, y, up, gate, down = tensors((2, 3, 5), (2, 3, 4), (2, 4, 2), (2, 1, 2), (2, 2, 5))

    def product(*given: Tensor) -> Any:
        return Product.apply(given[0], given[1], None, None, given[2], given[3], None, None, given[4])[0]

    assert torch.autograd.gradcheck(product, (x, y, up, gate, down))
    for b in range(2):
        expected = y[b] + ((x[b] @ down[b].mT) * gate[b]) @ up[b].mT
        torch.testing.assert_close(product(x, y, up, gate, down)[b], expected)


def written_out(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """`call()` by the definition."""
    with monkeypatch.context() as patched:
        patched.setattr(lowrank, "_can_fuse", lambda _: False)
        return call()


def of(view: PeftModel, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every gradient."""
    view.zero_grad(set_to_none=True)
    out = view(ids(3, 5), **how).logits
    out.pow(2).mean().backward()
    return out.detach(), {n: p.grad for n, p in view.named_parameters() if p.grad is not None}


def several(count: int, **how: Any) -> PeftModel:
    view = PeftModel(llama().double())
    for i in range(count):
        targets = LINEARS[: 4 + i % 4]
        view.add_adapter(f"a{i}", LoraConfig(r=1 + i % 3, target_modules=targets, init_lora_weights=False, **how))
    return view


@pytest.mark.parametrize(
    "how",
    [
        {"adapters": "a0"},
        {"adapters": Sum("a0", "a1", weights=(0.5, -2.0))},
        {"adapters": Sum("a2", "a3", weights=[torch.tensor([1.0, 0.0, 0.5]), 1.0])},
        {"adapter_names": ["a0", None, "a1 + 0.5*a2"]},
        {"adapter_names": [Sum(*[f"a{i}" for i in range(k, k + 5)]) for k in (0, 5, 10)]},
        {"adapter_names": ["a3", "a8", "a13"]},
    ],
    ids=str,
)
def test_a_model_equals_the_definition(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    view = several(15)
    expected, theirs = written_out(lambda: of(view, **how), monkeypatch)  # type: ignore[arg-type,return-value]
    out, ours = of(view, **how)
    close(out, expected, 1e-12)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        close(grad, theirs[name], 1e-11)
    with torch.no_grad():
        close(view(ids(3, 5), **how).logits, expected, 1e-12)


def test_many_rows_are_stacked_and_equal_each_alone() -> None:
    """16 rows of 16 adapters, of other ranks and targets; and changed, frozen ones are not taken from the last call."""
    view = several(16).requires_grad_(False)
    tokens, names = ids(16, 4), [f"a{i}" for i in range(15, -1, -1)]
    with torch.no_grad():
        for _ in range(3):
            out = view(tokens, adapter_names=names).logits
            for b, name in enumerate(names):
                close(out[b], view(tokens[b : b + 1], adapters=name).logits[0])
            for p in view.get_adapter("a3").parameters():
                p.mul_(1.5)
            for p in view.get_adapter("a5").parameters():
                p.data = p.data * 0.5
    call = next(iter(view._plans.rows([view.checked(n) for n in names], None)[0].calls.values()))
    assert isinstance(call, lowrank.LowRankCall)
    assert call.rows is not None


def test_what_is_dropped() -> None:
    """Each entry with the same probability; the same in the backward; none where nothing trains."""
    torch.manual_seed(0)
    x = torch.ones(400, 300)
    mask = Dropped(x, 0.25)
    assert torch.equal(mask(), mask())
    kept = mask()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(kept.mean().item() - 0.75) < 0.02
    assert len(kept.unique(dim=0)) > 350  # rows differ
    assert kept.mean(0).std() < 0.05
    view = PeftModel(nn.Sequential(nn.Linear(30, 20)), LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5), "a")
    nn.init.normal_(view.get_adapter("a").parts[0].method.B)  # type: ignore[arg-type]
    x = torch.randn(2000, 30)
    dry = view.eval()(x)
    wet = torch.stack([view.train()(x) for _ in range(30)])
    assert not torch.equal(wet[0], wet[1])
    assert ((wet.mean(0) - dry).norm() / (wet[0] - dry).norm()) < 0.3  # the mean of 30 is the undropped one
    with torch.no_grad():
        assert not torch.equal(view(x), dry)


def saved(view: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes kept for the backward beside parameters."""
    own = {p.untyped_storage().data_ptr() for p in view.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (at := t.untyped_storage().data_ptr()) not in own:
            found[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(found.values())


def test_siblings_keep_one_input_and_no_mask() -> None:
    """Three layers that read one x: x once, and R numbers a token for each."""
    base = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj", "v_proj")})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = base

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers.values())  # type: ignore[return-value]

    view = PeftModel(Block(), LoraConfig(r=2, target_modules=list(base), lora_dropout=0.1), "a").train()
    x = torch.randn(1000, 64)
    small = 3 * 2 * 1000 * 4 + 8 * 1000 + 4 * (64 + Dropped.STARTS)  # z of each; where rows start; the line
    assert saved(view, lambda: view(x * 1)) <= x.numel() * 4 + small


def test_a_sibling_with_another_input_makes_its_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) + self.k_proj(2 * x)  # and values are not asked for

    view = PeftModel(Block(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj"]), "a")
    for part in view.get_adapter("a").parts:
        nn.init.normal_(part.method.B)  # type: ignore[arg-type]
    x, base = torch.randn(3, 6), view.get_base_model()
    change = {p.place.path: p.method.B @ p.method.A for p in view.get_adapter("a").parts}  # type: ignore[operator]
    close(view(x), base(x) + x @ change["q_proj"].mT + 2 * x @ change["k_proj"].mT)
    view(x).sum().backward()
    grads = {p.place.path: p.method.B.grad for p in view.get_adapter("a").parts}
    assert grads["v_proj"] is None
    assert all(part.method.A.grad is None for part in view.get_adapter("a").parts if part.place.path == "v_proj")


class Turned(nn.Module):
    """A linear layer of somebody else's, whose output does not lie in memory as it is indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 6, 5, None
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.mT).mT


def test_an_output_that_lies_otherwise_in_memory() -> None:
    view = PeftModel(nn.Sequential(Turned()), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "a")
    x, method = torch.randn(3, 4, 6), view.get_adapter("a").parts[0].method
    expected = view.get_base_model()(x) + x @ (method.B @ method.A * method.scale).mT  # type: ignore[operator]
    close(view(x), expected)
    with torch.no_grad():
        close(view(x), expected)


def test_siblings_of_which_one_drops() -> None:
    """Two adapters with one dropout, of which only the first trains: what the second adds is not dropped."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) * 0 + self.k_proj(x)

    view = PeftModel(nn.Sequential(Block()))
    for name in ("q", "k"):
        how = LoraConfig(r=2, target_modules=[f"{name}_proj"], lora_dropout=0.5, init_lora_weights=False)
        view.add_adapter(name, how)
    x = torch.randn(3, 6)
    dry = view.eval()(x, adapters="k")
    view.train()
    assert not torch.equal(view(x, adapters="k"), dry)
    view.get_adapter("k").eval()
    close(view(x, adapters=["q", "k"]), dry)


def test_adapters_made_in_inference_mode() -> None:
    """PyTorch counts no changes of their parameters."""
    with torch.inference_mode():
        view = several(12)
        names = [f"a{i}" for i in range(12)]
        out = view(ids(12, 4), adapter_names=names).logits
        for p in view.get_adapter("a3").parameters():
            p.mul_(2)
        close(view(ids(12, 4), adapter_names=names).logits[3], view(ids(12, 4)[3:4], adapters="a3").logits[0])
        close(view(ids(12, 4), adapter_names=names).logits[4], out[4])
