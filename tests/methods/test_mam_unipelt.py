"""MAM and UniPELT as compositions: they train, all of their parts do, and they learn more than nothing."""

from typing import Any

import pytest
import torch

from coadapt import BottleneckConfig, LoraConfig, PeftModel, PooledRouter, PrefixTuningConfig, Sum
from models import MODELS, ids


def mam(view: PeftModel) -> Any:
    """2110.04366, section 4.6: a small prefix at the attention, a scaled bottleneck beside the feed-forward part."""
    view.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3))
    view.add_adapter("beside", BottleneckConfig(bottleneck_size=8, placement="parallel", scaling=4.0))
    return "prefix + beside"


def unipelt(view: PeftModel) -> Any:
    """2110.07577, section 2.2: a gate before each of three methods, made of what the site is given."""
    view.add_adapter("lora", LoraConfig(r=4, lora_alpha=2))
    view.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3))
    view.add_adapter("behind", BottleneckConfig(bottleneck_size=8))
    return Sum("lora", "prefix", "behind", weights=PooledRouter(activation="sigmoid"))


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("mix", [mam, unipelt])
def test_every_part_trains(mix: Any, model: str) -> None:
    torch.manual_seed(0)
    view = PeftModel(MODELS[model]())
    view.set_adapter(mix(view))
    view.train()
    tokens = ids(4)
    labels = tokens if model == "llama" else torch.tensor([0, 1, 2, 1])
    before = {n: p.detach().clone() for n, p in view.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in view.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = view(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.995 * losses[0]  # the head is frozen, and random
    still = [n for n, p in view.named_parameters() if n in before and torch.equal(p, before[n])]
    assert still == []
    if mix is unipelt:
        shares = view.gates[0].shares()  # type: ignore[operator]
        assert sorted(shares) == [0, 1, 2]
        assert all(0 < share < 1 for share in shares.values())
