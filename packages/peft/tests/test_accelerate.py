"""accelerate: a loop of one's own, with its states."""

from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from tiny import llama
from torch import Tensor


def test_a_state_is_saved_and_loaded_in_a_loop(tmp_path: Path, ids: Tensor) -> None:
    accelerator = Accelerator(cpu=True)
    made: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert is_peft_model(made)
    view, optimizer = accelerator.prepare(made, torch.optim.AdamW(made.get_adapter("default").parameters(), 1e-2))

    def step() -> Tensor:
        optimizer.zero_grad()
        accelerator.backward(view(ids, labels=ids).loss)
        optimizer.step()
        return view(ids).logits.detach()

    first = step()
    accelerator.save_state(str(tmp_path))
    second = step()
    assert not torch.equal(first, second)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(view(ids).logits, first)
    torch.testing.assert_close(step(), second)
