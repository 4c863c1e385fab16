"""attach -> fully_shard -> detach: the base is whole again, and in between it trains as it does unsharded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from laws.setting import MAKE, attach, close, gradients, logits, loss


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one, on the CPU."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach-shard", "shard-attach"])
@pytest.mark.parametrize("case", ["lora", "bottleneck", "prefix"])
def test_sharded_and_taken_off(case: str, attach_first: bool) -> None:
    expected = attach(MAKE["llama"](), "llama", case)
    loss(expected).backward()
    theirs = gradients(expected)
    base: Any = MAKE["llama"]()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    view = attach(base, "llama", case) if attach_first else None
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh)
    view = view or attach(base, "llama", case)
    close(full(logits(view)), logits(expected))
    loss(view).backward()
    for name, gradient in gradients(view).items():
        other = theirs[name]
        assert gradient is not None
        assert other is not None
        close(full(gradient), other, 1e-5)
    plain = logits(MAKE["llama"]())
    close(full(logits(base)), plain)
    view.unload()
    close(full(logits(base)), plain)
    assert isinstance(base, FSDPModule)
    assert not any("Site" in c.__name__ for m in base.modules() for c in type(m).__mro__)
    kept = [type(m).__name__ for m in base.modules() if isinstance(m, nn.Linear)]
    assert set(kept) == {"Linear"}


@pytest.mark.usefixtures("alone")
def test_a_whole_view_can_be_sharded() -> None:
    expected = attach(MAKE["llama"](), "llama", "lora", "bottleneck")
    view = attach(MAKE["llama"](), "llama", "lora", "bottleneck")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(view, mesh=mesh)
    close(full(logits(view)), logits(expected))
    loss(view).backward()
    assert all(g is not None for g in gradients(view).values())


@pytest.mark.usefixtures("alone")
def test_layers_split_by_tensor_parallelism_are_refused() -> None:
    """transformers' own (`tp_plan`) have a forward of the instance's, which no adapter would be asked in."""
    base: Any = MAKE["llama"]()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    plan = {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    for layer in base.model.layers:
        parallelize_module(layer.self_attn, mesh, plan)
    classes, trains = [type(m) for m in base.modules()], [p.requires_grad for p in base.parameters()]
    message = r"q_proj.weight is split by tensor parallelism \(\(Shard\(dim=0\),\).*Load the model without tp_plan"
    with pytest.raises(ValueError, match=message):
        attach(base, "llama", "lora")
    with pytest.raises(ValueError, match=message):
        attach(base, "llama", "prompt")
    assert [type(m) for m in base.modules()] == classes
    assert [p.requires_grad for p in base.parameters()] == trains
