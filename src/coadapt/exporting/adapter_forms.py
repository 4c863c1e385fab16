"""Adapters for programs that take adapters."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..combining import Options, Report, combine
from ..combining.deltas import fixed, sites
from ..core.adapter import Adapter, replace_options
from ..core.base import base_of
from ..core.composition import Node, names
from ..core.method import AttentionMethod, InputMethod
from ..formats import files, mlx
from ..formats import folder as folders
from ..formats.configs import readable
from ..formats.gguf import adapter as gguf
from ..model import PeftModel
from . import model_forms
from .measuring import Drift, Inputs, drift, logits
from .plain import RANK, Obstacle, obstacles, plain_lora
from .targets import Target

OLLAMA = ("llama", "mistral", "gemma2")
"""Models whose adapters Ollama converts itself; those of others it takes as GGUF."""
ROOMS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told to have room for."""
PLAIN = "adapter"


def prepared(
    aim: Target, view: PeftModel, node: Node, tokenizer: Any, r: Any
) -> Callable[[Path, Inputs | None], model_forms.Done]:
    """What writes the adapter. Raises ValueError where the target does not take it."""
    base: Any = view.get_base_model()
    if base_of(base).merged_by is not None:
        raise RuntimeError("Adapters are merged into the base; unmerge_adapter() before they are exported.")
    form = aim.adapter
    if aim.name == "ollama" and getattr(getattr(base, "config", None), "model_type", "") not in OLLAMA:
        form = "gguf"
    if form == "gguf":
        gguf.check(base)
    if form == "mlx":
        mlx.check(base)
    adapter, report = made(aim, view, node, r)
    rank = max((row.rank or 0 for row in report.rows), default=0) if report else 0
    if aim.most_rank and rank > aim.most_rank:
        raise ValueError(
            f"The LoRA has rank {rank}; {aim.name} takes {aim.most_rank} at most. Give the rank to keep (r=, --r), or "
            "write the merged model (merged=True, --merged)."
        )
    adapter.config = replace_options(adapter.config, base_model_name_or_path=model_forms.base_name(view))

    def write(new: Path, inputs: Inputs | None) -> model_forms.Done:
        plain = new / PLAIN
        folders.save(plain, {"default": adapter}, "default", base, base_of(base).fingerprint)
        off = None if inputs is None else _drift(view, node, plain, inputs)
        done = model_forms.Done(report=report, drift=off, room=next((n for n in ROOMS if n >= rank), rank))
        _formed(new, form, aim, adapter, view, tokenizer, done)
        return done

    return write


def made(aim: Target, view: PeftModel, node: Node, r: Any) -> tuple[Adapter, Report | None]:
    """The adapter to write; None for the report where it is one of the view's, as it is."""
    base: Any = view.get_base_model()
    node = fixed(node)
    adapters = {name: view.get_adapter(name) for name in names(node)}
    found = obstacles(base, adapters, node, aim.ends)
    only = adapters[node] if isinstance(node, str) else None
    own = only is not None and aim.own_kinds and only.config.method not in aim.but_for
    if own and only is not None and r is None and (found or only.config.method != "LORA"):
        if readable(only.config, only, base) and (aim.virtual or not _is_virtual(only)):
            return only, None
    if not found:
        return plain_lora(base, adapters, node, r)
    virtual = any(_is_virtual(adapter) for adapter in adapters.values())
    if aim.own_kinds and (aim.virtual or not virtual):
        how, options = _way(adapters, node, r) if all(o.merges for o in found) else (None, Options(r=r))
        return combine(base, adapters, node, how, "default", options)
    raise refusal(aim, found)


def _way(adapters: Mapping[str, Adapter], node: Node, r: Any) -> tuple[str | None, Options]:
    """How `combine` is to be asked: exactly where that is possible."""
    matrices = [site for site in sites(adapters, node) if site.is_matrix and site.moves(node)]
    if r is None and all(site.factors(node) is not None for site in matrices):
        return None, Options()
    return "svd", Options(r=r or RANK)


def _is_virtual(adapter: Adapter) -> bool:
    return any(isinstance(part.method, AttentionMethod | InputMethod) for part in adapter.parts)


def refusal(aim: Target, found: list[Obstacle]) -> ValueError:
    """What the target does not take, and what to do instead."""
    never = [o.what for o in found if not o.merges]
    told = (never or [o.what for o in found])[:3]
    more = f", and {len(found) - len(told)} more" if len(found) > len(told) and not never else ""
    if never:
        rest = "Nor can that be merged. Name the others (adapters=, --adapters), or serve it with coadapt."
    else:
        rest = "Write the merged model (merged=True, --merged), or name the others (adapters=, --adapters)."
    takes = "no virtual tokens" if aim.own_kinds else "a plain LoRA at linear layers"
    return ValueError(f"{aim.name} takes {takes}: {'; '.join(told)}{more}. {rest}")


def _drift(view: PeftModel, node: Node, folder: Path, inputs: Inputs) -> Drift:
    """The folder, loaded again into a view of its own, beside the composition."""
    base: Any = view.get_base_model()
    meant, plain = logits(view, inputs, adapters=node), logits(base, inputs)
    again = PeftModel.from_pretrained(base, folder)
    try:
        return drift(meant, logits(again, inputs), plain)
    finally:
        again.unload()


def _formed(
    new: Path, form: Any, aim: Target, adapter: Adapter, view: PeftModel, tokenizer: Any, done: model_forms.Done
) -> None:
    """The folder as the target wants it, from our own in it."""
    base, plain = view.get_base_model(), new / PLAIN
    if form == "folder":
        if aim.name != "ollama":
            for file in plain.iterdir():
                file.rename(new / file.name)
            plain.rmdir()
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
        else:
            _modelfile(new, model_forms.base_name(view), f"./{PLAIN}")
        return
    shutil.rmtree(plain)
    if form == "mlx":
        (new / "adapter_config.json").write_text(json.dumps(mlx.config(adapter, base), indent=2) + "\n", "utf-8")
        files.Saving(new).tensors("adapters.safetensors", mlx.tensors(adapter, base))
        return
    done.main.append("adapter.gguf")
    gguf.write(adapter, base, new / "adapter.gguf", new.name.removeprefix(".coadapt-writing."))
    if aim.name == "ollama":
        _modelfile(new, model_forms.base_name(view), "./adapter.gguf")


def _modelfile(new: Path, base: str, adapter: str) -> None:
    local = Path(base).absolute() if Path(base).is_dir() else base
    (new / "Modelfile").write_text(
        "# FROM must be the model that the adapter was trained on: a folder of its safetensors, a GGUF file of it, or\n"
        f"# its name in Ollama's library.\nFROM {local}\nADAPTER {adapter}\n",
        "utf-8",
    )
