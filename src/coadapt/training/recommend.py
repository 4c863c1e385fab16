"""`coadapt.recommended`: a method's tested starting values, as a configuration and rates to train it with."""

from dataclasses import dataclass, fields

from torch import nn

import coadapt.methods  # noqa: F401  makes the configurations known
from coadapt.config import CONFIGS, PeftConfig
from coadapt.core.store import count
from coadapt.model import PeftModel
from coadapt.training.options import check_needed, default_options, default_rate, method_named
from coadapt.training.settings import RunConfig


@dataclass(frozen=True, kw_only=True, repr=False)
class Recommended:
    """What to start from with a method; the values that `coadapt train` uses where none is given."""

    method: str
    config: PeftConfig
    """For `get_peft_model` and `add_adapter`."""
    learning_rate: float
    """Peak rate of AdamW, for `param_groups`."""
    weight_decay: float
    warmup_steps: float
    """Below 1: a share of all steps."""
    source: str
    """Where the rate is from."""

    def __repr__(self) -> str:
        """The rates, and those options of the configuration that are not its class's defaults."""
        chosen = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name != "peft_type"}
        usual = {f.name: f.default for f in fields(self.config)}
        shown = ", ".join(f"{name}={value!r}" for name, value in chosen.items() if value and value != usual[name])
        return (
            f"Recommended({self.method}: learning_rate={self.learning_rate:g} ({self.source}), "
            f"weight_decay={self.weight_decay:g}, warmup_steps={self.warmup_steps:g}, "
            f"config={type(self.config).__name__}({shown}))"
        )


def recommended(method: str, model: nn.Module | None = None) -> Recommended:
    """Tested starting values of a method, for `model`.

    `view.add_adapter("task", found.config)`, then `view.param_groups({"task": found.learning_rate})`.

    >>> found = recommended("lora")
    >>> found.config.r, found.config.lora_alpha, found.learning_rate
    (16, 32, 0.0002)

    Args:
        method: lora, dora, prompt, boft … or any other, in the usual spellings.
        model: the base, or a view of it, that shall be adapted. Below 10 million parameters the rates are those that
            were measured on such models (docs/learning_rates.md), otherwise, and for None, the published ones.

    Raises:
        ValueError: an unknown method; the nearest name is told. Or one that needs options which nobody can guess.
        TypeError: `model` is no model.
    """
    known = method_named(method)
    rate, source = default_rate(known.name, None if model is None else parameters(model))
    options = default_options(known.name, {})
    check_needed("recommended", known, options)
    run = RunConfig.model_fields
    decay = options.pop("weight_decay", run["weight_decay"].default)
    return Recommended(
        method=known.name,
        config=CONFIGS[known.kind](**known.fixed, **options),
        learning_rate=rate,
        weight_decay=decay,
        warmup_steps=run["warmup_steps"].default,
        source=source,
    )


def parameters(model: nn.Module) -> int:
    """How many parameters a base has, adapters left out."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"recommended: model must be a torch model or None, not a {type(model).__name__}.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return count(base)
