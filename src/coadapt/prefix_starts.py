"""Prefixes and cartridges that start as what the model makes of a text, by the field's names."""

from typing import Any

import torch

from .methods.prefix import PrefixTuning
from .model import PeftModel


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel, *, past_key_values: Any, adapter_name: str | None = None
) -> None:
    """Has a cartridge or a prefix stand at the first N keys and values of a cache of one row.

    Args:
        past_key_values: as the base returns it with `use_cache=True`; keys (1, H, S, D), S >= N.

    Raises:
        ValueError: the cache has another shape.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    layers = getattr(past_key_values, "layers", None)
    pairs = [tuple(pair)[:2] for pair in past_key_values] if layers is None else [(c.keys, c.values) for c in layers]
    for part in model.get_adapter(name).parts:
        if not isinstance(part.method, PrefixTuning) or part.place.role != "decoder":
            raise ValueError(f"{name!r} is a {type(part.method).__name__} at {part.place.path!r}, which has no cache.")
        n, _, heads, dim = part.method.shape
        number: Any = part.place.module.layer_idx
        keys, values = pairs[number]
        if keys.shape[:2] != (1, heads) or keys.shape[3] != dim or keys.shape[2] < n:
            raise ValueError(
                f"{name!r} needs keys of shape (1, {heads}, at least {n}, {dim}) at {part.place.path!r}; the cache has "
                f"{tuple(keys.shape)}."
            )
        part.method.start_at(torch.stack([keys[0, :, :n], values[0, :, :n]]).permute(2, 0, 1, 3))


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> None:
    """The same with what the base makes of a text, as a system's message where the tokenizer has a template for it.

    Raises:
        ValueError: the text has fewer tokens than the adapter.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    config: Any = model.peft_config[name]
    n = config.num_virtual_tokens
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        said = [{"role": "system", "content": text}]
        ids = list(tokenizer.apply_chat_template(said, add_generation_prompt=False, return_dict=False))
    else:
        ids = list(tokenizer(text)["input_ids"])
    if len(ids := ids[:max_length]) < n:
        raise ValueError(f"The text has {len(ids)} tokens, and {name!r} has {n}. Give a longer text, or fewer tokens.")
    base: Any = model.get_base_model()
    first = torch.tensor([ids[:n]], device=next(base.parameters()).device)  # what comes later changes nothing in them
    cache = base(input_ids=first, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, adapter_name=name)
