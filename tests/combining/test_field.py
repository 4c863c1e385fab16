"""`add_weighted_adapter` as in the field, and results that the field's library loads."""

import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from models import gpt2, llama, logits, mixtral, stir, t5

MODELS: dict[str, Any] = {"llama": llama, "gpt2": gpt2, "t5": t5, "mixtral": mixtral}


@pytest.fixture(autouse=True)
def theirs_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def two(make: Any, tmp_path: Any, r: tuple[int, int] = (4, 4), **options: Any) -> tuple[PeftModel, Any]:
    """The same two LoRAs in coadapt and in the field's library."""
    view = get_peft_model(make(), LoraConfig(r=r[0], lora_alpha=8, **options), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=r[1], lora_alpha=6, **options))
    stir(view.get_adapter("a"), seed=1)
    stir(view.get_adapter("b"), seed=2)
    view.save_pretrained(tmp_path / "both")
    model = peft.PeftModel.from_pretrained(make(), tmp_path / "both" / "a", adapter_name="a")
    model.load_adapter(tmp_path / "both" / "b", "b")
    return view, model.eval()


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


RESULTS: list[tuple[str, str, dict[str, Any]]] = [
    *((model, kind, {}) for model in ("llama", "gpt2", "t5") for kind in ("cat", "svd")),
    ("llama", "svd", {"svd_rank": 2}),
    ("llama", "ties_svd", {"density": 0.5, "svd_rank": 5}),
    ("llama", "ties_svd", {"density": 0.3, "majority_sign_method": "frequency"}),
    ("llama", "magnitude_prune_svd", {"density": 0.4}),
]


@pytest.mark.parametrize(("model", "kind", "options"), RESULTS)
def test_the_fields_results(model: str, kind: str, options: dict[str, Any], tmp_path: Any) -> None:
    view, theirs = two(MODELS[model], tmp_path)
    report = view.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", kind, **options)
    theirs.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination_type=kind, **options)
    theirs.set_adapter("new")
    assert off(logits(view, adapters="new"), logits(view, adapters=[])) > 1e-3
    assert off(logits(view, adapters="new"), logits(theirs)) < 2e-5
    assert report.lost is not None


def test_types_without_svd_work_on_the_changes_themselves(tmp_path: Any) -> None:
    """Theirs act on A and B apart, and are far from the sum that the weights say; ours keep the best of that rank."""
    view, theirs = two(llama, tmp_path)
    view.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "linear")
    view.combine("0.5*a + 0.5*b", "ab_linear", adapter_name="apart")
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", combination_type="linear")
    theirs.set_adapter("new")
    expected = logits(view, adapters="0.5*a + 0.5*b")
    assert off(logits(view, adapters="apart"), logits(theirs)) < 1e-5
    assert off(logits(view, adapters="new"), expected) < 0.6 * off(logits(theirs), expected)


@pytest.mark.parametrize(
    "kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune", "dare_linear_svd", "dare_ties_svd"]
)
def test_every_type_and_its_seed(kind: str, tmp_path: Any) -> None:
    view, _ = two(llama, tmp_path, r=(2, 3))
    for name in ("one", "two"):
        torch.manual_seed(7)
        report = view.add_weighted_adapter(["a", "b"], [0.7, -0.3], name, kind, density=0.5)
    assert max(row.rank or 0 for row in report.rows) == 3
    assert torch.equal(view.get_adapter("one").weight, view.get_adapter("two").weight)


def test_what_would_have_no_effect(tmp_path: Any) -> None:
    view, _ = two(llama, tmp_path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"adapters": ["a", "x"]}, "There is no adapter 'x'"),
        ({"adapter_name": "a"}, "There is an adapter 'a' already"),
        ({"combination_type": "svds"}, "Did you mean 'svd'"),
        ({"combination_type": "linear", "svd_rank": 3}, "svd_rank has no effect"),
        ({"combination_type": "cat", "density": 0.5}, "density has no effect"),
        ({"combination_type": "ties"}, "needs density="),
        ({"combination_type": "svd", "majority_sign_method": "frequency"}, "majority_sign_method has no effect"),
        ({"svd_clamp": 0.99}, "svd_clamp"),
        ({"svd_driver": "gesvd"}, "svd_driver"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            view.add_weighted_adapter(
                **{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new", **change}
            )
    assert sorted(view.peft_config) == ["a", "b"]
    view.add_adapter("p", PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="give svd_rank"):
        view.add_weighted_adapter(["p"], [1.0], "new")


# ---- files -----------------------------------------------------------------------------------------------------------

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(("model", "options"), [
    ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "rank_pattern": {"1.mlp.down_proj": 2}}),
    ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "c_fc"]}),
    ("t5", {}),
    ("mixtral", EXPERTS),
])  # fmt: skip
@pytest.mark.parametrize(("how", "more"), [("cat", {}), ("svd", {"r": 3})])
def test_the_fields_library_loads_the_result(
    model: str, options: dict[str, Any], how: str, more: dict[str, Any], tmp_path: Any
) -> None:
    view = get_peft_model(MODELS[model](), LoraConfig(r=4, use_rslora=True, **options), adapter_name="a")
    view.add_adapter(
        "b", LoraConfig(r=2, lora_alpha=5, **({} if model == "mixtral" else {"target_modules": "all-linear"}))
    )
    stir(view.adapters)
    view.combine("0.5*a - b", how, adapter_name="new", **more)
    expected = logits(view, adapters="new")
    view.set_adapter("new")
    view.save_pretrained(tmp_path, selected_adapters=["new"])
    theirs = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path / "new").eval()
    assert off(logits(theirs), expected) < 1e-5


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_the_fields_library_loads_virtual_tokens(config: Any, tmp_path: Any) -> None:
    view = get_peft_model(llama(), config(num_virtual_tokens=3, task_type="CAUSAL_LM"), adapter_name="a")
    view.add_adapter("b", config(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    stir(view.adapters, by=0.5)
    view.combine("a >> b", adapter_name="new")
    expected = logits(view, adapters="a >> b")
    view.save_pretrained(tmp_path, selected_adapters=["new"])
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "new").eval()
    assert off(logits(theirs)[:, -expected.shape[1] :], expected) < 1e-5
