"""VeRA and its kin: what a seed makes again, what is drawn while training, and what follows from the base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coadapt import FrodConfig, LilyConfig, PeftModel, PveraConfig, RandLoraConfig, TinyLoraConfig, UniLoraConfig
from coadapt.config import PeftConfig
from models import ids, llama, logits, stir

SEEDED: dict[str, PeftConfig] = {
    "pvera": PveraConfig(r=5, save_projection=False, init_weights=False),
    "randlora": RandLoraConfig(r=6, randlora_alpha=1, save_projection=False, init_weights=False),
    "tinylora": TinyLoraConfig(u=5, save_projection=False),
    "unilora": UniLoraConfig(theta_d_length=20),
    "frod": FrodConfig(sparse_rate=0.1, save_projection=False),
}


@pytest.mark.parametrize("case", SEEDED)
def test_what_files_leave_out_is_made_again(case: str, tmp_path: Path) -> None:
    view = PeftModel(llama(), SEEDED[case])
    stir(view.adapters)
    expected = logits(view)
    view.save_pretrained(tmp_path)
    largest = max(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert largest <= 6 * 32, "no basis among them"
    torch.manual_seed(9)  # another than that of the first
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_pvera_draws_while_it_trains() -> None:
    """The mean of many draws is what the merged weights give, and their spread what the formula says."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    view = PeftModel(layer, PveraConfig(r=4, target_modules=["0"], init_weights=False))
    method: Any = view.get_adapter("default").parts[0].method
    x = torch.randn(1, 6)
    merged = view.eval()(x).detach()
    assert torch.equal(view(x), merged)
    drawn = torch.stack([view.train()(x) for _ in range(4000)]).detach()
    a, b = method.scaled()
    spread = ((b * b) @ (a[4:] @ x[0]).exp()).sqrt().detach()  # sqrt(sum_r b_r^2 exp(v_r))
    assert float(((drawn.mean(0) - merged).abs() / spread).max()) < 5 / 4000**0.5
    torch.testing.assert_close(drawn.std(0)[0], spread, rtol=0.06, atol=0)
    view = PeftModel(layer, PveraConfig(r=4, target_modules=["0"], init_weights=False, sample_at_inference=True)).eval()
    assert not torch.equal(view(x), view(x))


def test_frod_takes_the_base_apart_along_the_v_of_the_file(tmp_path: Path) -> None:
    """Another V, as of another machine: l is of its own, and U follows. The field's library keeps a U of its own V."""
    view = PeftModel(llama(), FrodConfig(target_modules=["q_proj"]))
    base = logits(view.base)
    torch.testing.assert_close(logits(view), base, rtol=0, atol=0)
    view.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    v = (tensors["base_model.frod_V.self_attn_q_proj"] @ turn).contiguous()
    lengths = {
        key: torch.linalg.solve(v.double(), view.base.get_parameter(f"{path}.weight").double().mT).norm(dim=1).float()
        for key, path in (
            (k, k[len("base_model.model.") : -len(".frod_lambda_l")]) for k in tensors if k.endswith("_l")
        )
    }
    save_file({**tensors, **lengths, "base_model.frod_V.self_attn_q_proj": v}, file)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), base, rtol=1e-5, atol=1e-5)


def test_tinylora_ties_as_much_as_asked() -> None:
    counts = []
    for tied in (0.0, 0.5, 1.0):
        view = PeftModel(llama(), TinyLoraConfig(u=5, weight_tying=tied, target_modules=["q_proj", "v_proj"]))
        counts.append(sum(p.numel() for p in view.parameters() if p.requires_grad))
    assert counts == [4 * 5, 2 * 5, 5]


def test_lily_shares_by_name() -> None:
    """Neighbours share A, all share B, and with a mixture per token a row is what it is alone."""
    config = LilyConfig(r=3, stride_A=2, num_B=2, target_modules=["q_proj", "v_proj"], init_weights=False)
    view = PeftModel(llama(num_hidden_layers=4), config)
    methods: list[Any] = [part.method for part in view.get_adapter("default").parts]
    q = [m for m, part in zip(methods, view.get_adapter("default").parts, strict=True) if "q_proj" in part.place.path]
    assert [m.A is q[0].A for m in q] == [True, True, False, False]
    assert q[2].A is q[3].A
    assert all(m.B is q[0].B for m in q)
    assert len({id(m.R) for m in methods}) == 8
    whole = logits(view)
    torch.testing.assert_close(logits(view, ids()[1:2]), whole[1:2], rtol=1e-5, atol=1e-6)
