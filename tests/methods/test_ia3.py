"""IA3: which side of a layer is rescaled, and where."""

import pytest
import torch
from torch import nn

from coadapt import IA3Config, get_peft_model
from models import bert, gpt2, llama, stir, t5


def test_outputs_of_keys_and_values_inputs_where_the_feed_forward_part_ends() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    view = get_peft_model(base, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    stir(view.adapters, by=0.5)
    out, into = (p.detach() for p in view.get_adapter("default").parameters())
    x = torch.randn(2, 4)
    torch.testing.assert_close(view(x), base[1](into * (out * base[0](x))))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, {"k_proj": 16, "v_proj": 16, "down_proj": 48}),
        (gpt2, {"c_attn": 96, "c_proj": 128}),
        (t5, {"k": 24, "v": 24, "wo": 40}),
        (bert, {"key": 32, "value": 32, "dense": 40}),
    ],
)
def test_the_usual_places(make: object, expected: dict[str, int]) -> None:
    view = get_peft_model(make(), IA3Config())  # type: ignore[operator]
    found = {
        p.place.path.rpartition(".")[2]: sum(q.numel() for q in p.method.parameters())
        for p in view.get_adapter("default").parts
    }
    assert found == expected


def test_feed_forward_modules_that_are_no_targets() -> None:
    with pytest.raises(ValueError, match=r"feedforward_modules \['down_proj'\] matches none of the targets"):
        get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"]))
