"""What each method can do, found by doing it on small models: `python tools/abilities.py` prints the table."""

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cases import CASES  # noqa: E402
from coadapt import PeftModel, Sum, export  # noqa: E402
from coadapt.config import PeftConfig, TargetedConfig  # noqa: E402
from coadapt.core.method import METHODS, WeightMethod  # noqa: E402
from coadapt.formats.configs import READABLE  # noqa: E402
from formats.field import grouping  # noqa: E402
from laws.setting import MAKE, attach, config_of, fits, logits, stir  # noqa: E402
from models import Holder  # noqa: E402


class Fused(nn.Module):
    """Experts in one parameter, all of them used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Parameter(torch.randn(4, 32, 32) / 6, requires_grad=False)  # (E, O, I)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,...i->...o", self.layers, x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 32), (2, 3, 32)),
    "conv": (lambda: nn.Conv2d(32, 32, 3, padding=1), (2, 32, 4, 4)),
    "embedding": (lambda: nn.Embedding(32, 32), (2, 3)),
    "norm": (lambda: nn.LayerNorm(32), (2, 3, 32)),
    "experts": (Fused, (2, 3, 32)),
}
ORDER = ("llama", "mixtral", "plain", "conv")
"""Models to try a method on: the first that it has a place in."""


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def kinds(config: PeftConfig) -> str:
    """The kinds of layer that it adapts."""
    if not isinstance(config, TargetedConfig) or not issubclass(METHODS[config.method], WeightMethod):
        return "-"
    return ", ".join(kind for kind in LAYERS if _adapts(config, kind))


def _adapts(config: TargetedConfig, kind: str) -> bool:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    x = torch.randint(0, 32, shape) if kind == "embedding" else torch.randn(shape)
    fused = {"target_modules": None, "target_parameters": ["layers"]}
    named: dict[str, Any] = fused if kind == "experts" else {"target_modules": ["layer"]}
    if getattr(config, "use_bdlora", None):
        named["use_bdlora"] = {"target_modules_bd_a": ["layer"], "nblocks": 2}
    try:
        view = PeftModel(Holder(layer), replace(config, **named))
    except (ValueError, TypeError):
        return False
    stir(view.adapters, by=0.3)
    return far(view(x), view.base(x)) > 1e-6


def together(case: str, model: str) -> bool:
    """Two adapters of the method, and a LoRA, in one call: their sum is none of them alone."""
    view = attach(MAKE[model](), model, case, case, "lora")
    both = logits(view, adapters="a + b + c")
    return all(far(both, logits(view, adapters=name)) > 1e-6 for name in ("a", "b", "c"))


def rows(case: str, model: str) -> bool:
    """A row of a mixed batch is that row alone."""
    view = attach(MAKE[model](), model, case, "lora", "lora")
    mixed = logits(view, adapter_names=["a", "b", "__base__"])
    alone = torch.cat([logits(view, adapters=node)[i : i + 1] for i, node in enumerate(("a", "b", Sum()))])
    return far(mixed, alone) < 1e-5


def gates(case: str, model: str) -> bool:
    """Half of it is something else than all of it, and nothing of it is the base."""
    view = attach(MAKE[model](), model, case)
    half, whole, none = (logits(view, adapters=f"{gate}*a") for gate in (0.5, 1, 0))
    return far(half, whole) > 1e-7 and far(none, logits(view.base)) == 0


def merges(case: str, model: str) -> bool:
    """Into the base and out of it again, to the bit."""
    view = attach(MAKE[model](), model, case)
    adapted, plain = logits(view), logits(view.base)
    view.merge_adapter()
    merged = far(logits(view.base), adapted)
    view.unmerge_adapter()
    return merged < 1e-5 and torch.equal(logits(view.base), plain)


def becomes_a_lora(case: str, model: str) -> bool:
    """As a plain LoRA for other programs, with the error that is told."""
    view = attach(MAKE[model](), model, case)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(view, "vllm", Path(folder) / "out").report is not None


def goes_to_peft(case: str, model: str) -> bool:
    """peft reads the folder, and computes the same."""
    import peft

    kind = config_of(case, model).peft_type
    if kind not in list(peft.PeftType):
        raise ValueError("peft has no such method")
    view = attach(MAKE[model](), model, case)
    told = {"task_ids": torch.zeros(3, dtype=torch.long)} if view.get_adapter("a").tasks else {}
    expected = logits(view, **told)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view.save_pretrained(folder)
        if json.loads(Path(folder, "a", "adapter_config.json").read_text("utf-8")).get(READABLE) is False:
            raise ValueError("peft computes something else, and the folder says so")
        with pytest.MonkeyPatch.context() as patch:
            grouping(patch)
            theirs = peft.PeftModel.from_pretrained(MAKE[model](), f"{folder}/a").eval()
    got = logits(theirs, **told)
    return far(got[:, got.shape[1] - expected.shape[1] :], expected) < 1e-5


ABILITIES: dict[str, Callable[[str, str], bool]] = {
    "several at once": together,
    "rows of a batch": rows,
    "gates": gates,
    "merge, exact unmerge": merges,
    "files of peft": goes_to_peft,
    "as a LoRA": becomes_a_lora,
}


def reason(error: Exception) -> str:
    """The first sentence of an error, without the names of this model and this adapter."""
    first = re.split(r"[.:] (?=[A-Z])", str(error).splitlines()[0])[0]
    plain = re.sub(r"(, )?'[^' ]*' is adapted, (?=which)|'a' (is|cannot|adapts)", r"\2", first)
    plain = re.sub(r"^vllm takes a plain LoRA at linear layers: ", "", plain)
    plain = re.sub(r" at '[^']*'| of '[^']*'|'([\w.]*\.)+\w+'|; .*| \(.*?\)", "", plain)
    return " ".join(plain.split()).rstrip(".")


def tried(case: str) -> dict[str, str]:
    """Ability -> "yes", or why not in a few words."""
    model = next(m for m in ORDER if fits(case, m))
    found = {"layers": kinds(config_of(case, model))}
    for name, ability in ABILITIES.items():
        try:
            found[name] = "yes" if ability(case, model) else "no"
        except Exception as error:
            found[name] = f"no: {reason(error)}"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        print(case, tried(case))
