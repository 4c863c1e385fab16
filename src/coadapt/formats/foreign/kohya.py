"""kohya's and LyCORIS's files: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`, `.alpha`, `.hada_w1_a` …"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .layers import LORA, NAMES, Parts, add, checked

PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_transformer": "transformer",
    "lycoris": "",
}
"""What a name begins with -> the part of the pipeline, as diffusers calls it."""
_TENSORS = {"lora_down.weight": LORA[0], "lora_up.weight": LORA[1], "dora_scale": "lora_magnitude_vector"}
_WORDS = (
    "add_embedding add_k_proj add_q_proj add_v_proj conv_in conv_out conv_shortcut down_blocks down_proj embed_tokens "
    "emb_layers fc_in fc_out final_layer_norm gate_proj in_layers input_blocks k_proj layer_norm1 layer_norm2 "
    "label_emb linear_1 linear_2 lm_head mid_block middle_block o_proj out_layers out_proj output_blocks "
    "patch_embed position_embedding proj_in proj_mlp proj_out q_proj self_attn single_transformer_blocks "
    "skip_connection text_model text_projection time_emb_proj time_embed time_embedding time_text_embed "
    "timestep_embedder to_add_out to_k to_out to_q to_v token_embedding transformer_blocks up_blocks up_proj v_proj "
    "visual_projection x_embedder context_embedder norm1_context ff_context"
).split()
"""Names of modules that have an underscore of their own."""
_NAME = re.compile("|".join(sorted((*map(re.escape, _WORDS), r"[^_]+"), key=lambda w: (w == r"[^_]+", -len(w)))))


def is_one(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are keys of such a file."""
    return any(key.partition(".")[0].startswith(tuple(f"{start}_" for start in PARTS)) for key in tensors)


def path_of(name: str, paths: Mapping[str, str] | None) -> str:
    """A module's path from its name with underscores.

    Args:
        paths: such names of a model's modules -> their paths; left out, the names of modules that are known here tell.

    Raises:
        ValueError: the model has no such module.
    """
    if paths is not None:
        if name not in paths:
            raise ValueError(f"{name!r} is no module of this model.")
        return paths[name]
    found, at = list[str](), 0
    while at < len(name):
        part = next((m for m in [_NAME.match(name, at)] if m and name[m.end() : m.end() + 1] in ("", "_")), None)
        if part is None:
            part = re.compile(r"[^_]+").match(name, at)
        if part is None:
            raise ValueError(f"{name!r} is no module's name.")
        found.append(part[0])
        at = part.end() + 1
    return ".".join(found)


def read(tensors: Mapping[str, Tensor], paths: Mapping[str, Mapping[str, str]] | None = None) -> Parts:
    """Raises ValueError for tensors of other methods (LyCORIS has more), with their names."""
    parts: Parts = {}
    for key, tensor in tensors.items():
        name, _, end = key.partition(".")
        start = next((s for s in sorted(PARTS, key=len, reverse=True) if name.startswith(f"{s}_")), None)
        known = _TENSORS.get(end, end)
        if start is None or (known != "alpha" and not any(known in names for names in NAMES.values())):
            raise ValueError(f"{key!r} is not read: of kohya's and LyCORIS's files LoRA, LoHa, LoKr and DoRA are.")
        part = PARTS[start]
        path = path_of(name.removeprefix(f"{start}_"), None if paths is None else paths.get(part, {}))
        if known == "lora_magnitude_vector":
            tensor = _by_output(key, tensor)
        add(parts, part, path, known, tensor)
    return checked(parts)


def _by_output(key: str, scale: Tensor) -> Tensor:
    if scale.numel() != len(scale):
        raise ValueError(f"{key!r} is of lengths along inputs; DoRA has one for each output (LyCORIS's wd_on_output).")
    return scale.flatten()


def write(parts: Parts) -> dict[str, Tensor]:
    """The tensors of one file; two text encoders make it one of SDXL."""
    two = "text_encoder_2" in parts
    starts = {"unet": "lora_unet", "text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    starts |= {"transformer": "lora_transformer", "": "lycoris"}
    back = {ours: theirs for theirs, ours in _TENSORS.items()}
    out: dict[str, Tensor] = {}
    for part, modules in parts.items():
        if part not in starts:
            raise ValueError(f"kohya's files have no part {part!r}; they have {', '.join(filter(None, starts))}.")
        for path, changed in modules.items():
            name = f"{starts[part]}_{path.replace('.', '_')}"
            kernel = changed.tensors[LORA[0]].dim() - 2 if changed.method == "LORA" else 0
            for own, tensor in changed.tensors.items():
                if own == "lora_magnitude_vector":
                    tensor = tensor.view(-1, 1, *[1] * kernel)
                out[f"{name}.{back.get(own, own)}"] = tensor
            rank = changed.rank or 1
            out[f"{name}.alpha"] = torch.tensor(float(rank if changed.alpha is None else changed.alpha))
    return out
