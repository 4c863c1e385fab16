"""adapters.safetensors and adapter_config.json as mlx-lm's `load_adapters` reads them."""

from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.roles import blocks
from ..methods.lora import LoRA

PREFIXES = {
    "llama": "", "mistral": "", "qwen2": "", "qwen3": "", "gemma2": "", "gemma3_text": "", "gpt2": "model.",
}  # fmt: skip
"""Model type -> what mlx-lm puts before the names of the checkpoint; the same names otherwise."""
_LEFT_OUT = {"gpt2": "transformer."}
"""What transformers' modules have before those names."""


def check(base: Any) -> None:
    """Raises ValueError for a model whose names in mlx-lm are not known here."""
    kind = base.config.model_type
    if kind not in PREFIXES:
        raise ValueError(
            f"mlx-lm may have other names for the layers of a {kind} model, and an adapter is found by those; known "
            f"are: {', '.join(PREFIXES)}. Write the merged model (merged=True, --merged), which it loads by itself."
        )


def check_model(base: Any) -> None:
    """Raises ValueError for a model that mlx-lm does not load from a folder of transformers."""
    if base.config.model_type == "gpt2":
        raise ValueError(
            "mlx-lm reads GPT-2 only under other names of its weights than transformers writes. Write the adapter "
            "instead (without merged, --merged)."
        )


def tensors(adapter: Adapter, base: Any) -> dict[str, Tensor]:
    """lora_a (I, R) and lora_b (R, O) by MLX's names: y + scale * (x lora_a) lora_b."""
    found: dict[str, Tensor] = {}
    for part in adapter.parts:
        assert isinstance(part.method, LoRA)
        path = mlx_name(part.place.path, base)
        a, b, _ = part.method.factors()
        found[f"{path}.lora_a"] = a.detach().mT.contiguous()
        found[f"{path}.lora_b"] = b.detach().mT.contiguous()
    return found


def mlx_name(path: str, base: Any) -> str:
    """What mlx-lm calls the module at `path`."""
    kind = base.config.model_type
    return PREFIXES[kind] + path.removeprefix(_LEFT_OUT.get(kind, ""))


def config(adapter: Adapter, base: nn.Module) -> dict[str, Any]:
    """All layers get an adapter at `keys`, named from there on; what stands outside of the layers by its whole name."""
    layers = [block.path for block in blocks(base)]
    keys: list[str] = []
    for part in adapter.parts:
        inside = next((layer for layer in layers if part.place.path.startswith(f"{layer}.")), None)
        keys.append(mlx_name(part.place.path, base) if inside is None else part.place.path.removeprefix(f"{inside}."))
    first = adapter.parts[0].method
    assert isinstance(first, LoRA)
    return {
        "fine_tune_type": "lora",
        "num_layers": len(layers),
        "lora_parameters": {
            "rank": first.A.shape[0],
            "scale": float(first.scale),
            "dropout": 0.0,
            "keys": sorted(set(keys)),
        },
    }


def completed(facts: dict[str, Any]) -> dict[str, Any]:
    """A model's config.json with the fields that mlx-lm looks for and transformers 5 has put elsewhere or dropped."""
    rope = facts.get("rope_parameters") or {}
    added: dict[str, Any] = {}
    if "rope_theta" in rope:
        added["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        added["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if facts.get("model_type") == "gpt2":
        added["n_ctx"] = facts["n_positions"]
    return {**added, **facts}
