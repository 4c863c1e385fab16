"""What BitFit does where a layer has no bias."""

import pytest
import torch

from coadapt import BitFitConfig, get_peft_model
from models import ids, llama, logits, stir


def test_a_bias_that_is_new_is_told_of_when_it_is_merged_for_good() -> None:
    view = get_peft_model(llama(), BitFitConfig(target_modules=["q_proj"]))
    stir(view.adapters)
    wanted = logits(view, ids())
    with pytest.warns(UserWarning, match="2 layers that had no bias"):
        base = view.merge_and_unload()
    torch.testing.assert_close(logits(base, ids()), wanted)
