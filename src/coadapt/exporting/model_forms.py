"""Merged models for programs that take no adapters, or not these."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..combining import Report
from ..core.base import base_of
from ..core.composition import Node
from ..formats import mlx, onnx
from ..formats.files import PROVENANCE, read_json
from ..formats.gguf import model as gguf
from ..formats.provenance import versions
from ..model import PeftModel
from .measuring import ROWS, TOKENS, Drift, Inputs, drift, logits
from .merged import merged
from .placing import RECORD
from .targets import Target

EQUAL = 1e-3
"""Of the largest logit: what ONNX may be off before int8. More would be another model."""


ONNX_INPUTS = f"{ROWS} x {TOKENS} tokens"


@dataclass(kw_only=True)
class Done:
    """What a writer tells."""

    report: Report | None = None
    drift: Drift | None = None
    room: int = 0
    """The rank that vLLM is to have room for."""
    main: list[str] = field(default_factory=list[str])
    """The files that a program is given, the one to use first."""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])


def base_name(view: PeftModel) -> str:
    """What the base is called: by its adapters, else by itself."""
    named = [config.base_model_name_or_path for config in view.peft_config.values()]
    return next((name for name in named if name), None) or getattr(view.get_base_model(), "name_or_path", "") or "BASE"


def keep_provenance(new: Path, source: Path | None) -> None:
    """provenance.json says how prompts were put in training; `coadapt generate` reads it in what was exported, too."""
    if source is None or not (source / PROVENANCE).is_file():
        return
    own = read_json(new / PROVENANCE) if (new / PROVENANCE).is_file() else {}
    told = {**read_json(source / PROVENANCE), **own}
    (new / PROVENANCE).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")


def folder(new: Path, view: PeftModel, node: Node, tokenizer: Any, inputs: Inputs | None, for_mlx: bool) -> Done:
    """A plain folder of transformers."""
    meant, plain = _before(view, node, inputs)
    with merged(view, node) as base:
        done = Done(drift=None if inputs is None else drift(meant, logits(base, inputs), plain))
        whole: Any = base
        whole.save_pretrained(new)
    if for_mlx:
        facts = mlx.completed(read_json(new / "config.json"))
        (new / "config.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(new)
    return done


def gguf_file(
    new: Path, view: PeftModel, node: Node, tokenizer: Any, inputs: Inputs | None, quantised: bool, ollama: bool
) -> Done:
    """model.gguf; for Ollama with a Modelfile."""
    meant, plain = _before(view, node, inputs)
    name = "model.q8_0.gguf" if quantised else "model.gguf"
    with merged(view, node) as base:
        done = Done(main=[name], drift=None if inputs is None else drift(meant, logits(base, inputs), plain))
        gguf.write(base, tokenizer, new / name, new.name.removeprefix(".coadapt-writing."), quantised)
        if quantised and inputs is not None:
            done.facts["q8_0_drift"] = drift(meant, logits(gguf.rounded(base), inputs), plain)
    done.notes.append(f"{name} was read back: every tensor is as it was meant.")
    if ollama:
        (new / "Modelfile").write_text(f"FROM ./{name}\n", "utf-8")
    return done


def onnx_file(new: Path, view: PeftModel, node: Node, tokenizer: Any, inputs: Inputs | None, quantised: bool) -> Done:
    """model.onnx, run by onnxruntime and compared; with `quantised` model.int8.onnx beside it."""
    assert inputs is not None
    _, plain = _before(view, node, inputs)
    with merged(view, node) as base:
        whole: Any = base if _is_plain(base) else copy.deepcopy(base).float().cpu()
        inputs = {k: (v.float() if v.is_floating_point() else v).cpu() for k, v in inputs.items()}
        with torch.no_grad():
            meant = onnx.Plain(whole, list(inputs)).eval()(*inputs.values()).cpu()
        onnx.write(whole, new / "model.onnx", inputs)
        whole.config.save_pretrained(new)
    if tokenizer is not None:
        tokenizer.save_pretrained(new)
    opened = onnx.session(new / "model.onnx")
    off = drift(meant, onnx.run(opened, inputs), plain)
    if off.largest > EQUAL * float(meant.abs().max()):
        raise ValueError(f"onnxruntime computes something else than PyTorch: {off}. Nothing was written.")
    done = Done(main=["model.onnx"], drift=off)
    done.facts["onnx"] = _figures(new / "model.onnx", opened, inputs)
    if quantised:
        done.main.insert(0, "model.int8.onnx")
        onnx.quantise(new / "model.onnx", new / "model.int8.onnx")
        opened = onnx.session(new / "model.int8.onnx")
        done.facts["int8"] = _figures(new / "model.int8.onnx", opened, inputs)
        done.facts["int8_drift"] = drift(meant, onnx.run(opened, inputs), plain)
    return done


def _figures(file: Path, opened: Any, inputs: Inputs) -> dict[str, float]:
    size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
    return {"bytes": size, "seconds_per_call": onnx.seconds(opened, inputs)}


def _is_plain(base: Any) -> bool:
    """Whether it computes in float32 on the CPU, as the file will."""
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in base.parameters())


def _before(view: PeftModel, node: Node, inputs: Inputs | None) -> tuple[Any, Any]:
    """The logits of the composition, and of the base."""
    if inputs is None:
        return None, None
    return logits(view, inputs, adapters=node), logits(view.get_base_model(), inputs)


def add_record(new: Path, aim: Target, merge: bool, view: PeftModel, node: Node, done: Done) -> None:
    """export.json."""
    said = {
        "target": aim.name,
        "merged": merge,
        "composition": node if isinstance(node, str) else repr(node),
        "base": {"name": base_name(view), "fingerprint": base_of(view.get_base_model()).fingerprint},
        "versions": versions("onnx", "onnxruntime", "gguf"),
        **told(done),
    }
    (new / RECORD).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", "utf-8")


def told(done: Any) -> dict[str, Any]:
    """What was measured, as plain values."""

    def plain(value: Any) -> Any:
        return vars(value) if isinstance(value, Drift) else value

    report = None
    if done.report is not None:
        rows = [{"site": r.path, "how": r.how, "rank": r.rank, "lost": r.apart} for r in done.report.rows]
        report = {"lost": done.report.lost, "sites": rows}
    return {"lora": report, "drift": plain(done.drift), **{k: plain(v) for k, v in done.facts.items()}}
