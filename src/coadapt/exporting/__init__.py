"""A composition of adapters, written for the program that is to run it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..combining import Report
from ..core.composition import Node, names
from ..core.modes import evaluating
from ..core.replication import replication_of
from ..formats import mlx, onnx
from ..formats.gguf import model as gguf
from ..model import PeftModel
from . import adapter_forms, model_forms
from .measuring import Drift, samples
from .merged import refuse_unmergeable
from .placing import placed, refuse_taken
from .targets import TARGETS, Target, target_named

__all__ = ["TARGETS", "Drift", "Exported", "Target", "export"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what it is worth."""

    out: Path
    target: str
    merged: bool
    composition: str
    files: Mapping[str, int]
    """Name -> bytes."""
    use: str
    """The line that uses it."""
    report: Report | None = None
    """How the adapters became one LoRA, site by site; None where they were written as they are, or merged."""
    drift: Drift | None = None
    """What was written, loaded again, beside the composition itself; None where the model's inputs are not known."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else was measured."""
    notes: tuple[str, ...] = ()


def export(
    model: PeftModel,
    target: str,
    out: str | Path,
    *,
    tokenizer: Any = None,
    adapters: Any = None,
    merged: bool = False,
    r: Any = None,
    quantise: str | None = None,
    overwrite: bool = False,
    provenance: Path | None = None,
) -> Exported:
    """Writes adapters, or the model with them merged into it, for another program. The model stays as it is.

    An adapter becomes one plain LoRA: one rank, alpha = r, every scale within B; what has no factors (IA3, DoRA, copies
    of layers) becomes the best LoRA of rank `r`, and how far that is off is measured. docs/export.md has it all.

    Args:
        target: "peft", "transformers", "vllm", "tgi", "llamacpp", "ollama", "mlx" or "onnx".
        out: the folder to write.
        tokenizer: the tokenizer, or image processor, to write beside it. A GGUF file of a model needs one.
        adapters: what to write, as in `set_adapter`; what is active if left out.
        merged: the merged model, where the target takes adapters, too.
        r: the largest rank of the LoRA; "full" for as much as is exact. Left out, 16 for what has no factors.
        quantise: "int8" for ONNX, "q8_0" for the GGUF of a merged model.
        overwrite: replace a folder that `export` wrote before.
        provenance: the adapter's own folder, whose record of data and prompts goes along.

    Raises:
        ValueError: the target does not take this (names what, and what to do instead), an option has no effect, or
            `out` is taken. Nothing was written.
        RuntimeError: adapters are merged into the base already.
    """
    aim = target_named(target)
    merge = merged or aim.adapter is None
    _check_options(aim, merged, merge, r, quantise)
    node = _checked(model, adapters, aim, merge)
    where = Path(out)
    refuse_taken(where, overwrite)
    form = aim.merged if merge else aim.adapter
    write = _writer(aim, model, node, tokenizer, merge, r, quantise)
    with evaluating(model, model.get_base_model()):
        inputs = samples(model)
        with placed(where, overwrite) as new:
            done = write(new, inputs)
            if form == "folder" and aim.name != "ollama":
                model_forms.keep_provenance(new, provenance)
            model_forms.add_record(new, aim, merge, model, node, done)
    files = {str(p.relative_to(where)): p.stat().st_size for p in sorted(where.rglob("*")) if p.is_file()}
    shown = node if isinstance(node, str) else repr(node)
    use = _use(aim, merge, form, where, model, done)
    return Exported(
        out=where,
        target=target,
        merged=merge,
        composition=shown,
        files=files,
        use=use,
        report=done.report and replace(done.report, composition=shown),
        drift=done.drift,
        facts=done.facts,
        notes=tuple(done.notes),
    )


def _check_options(aim: Target, merged: bool, merge: bool, r: Any, quantise: str | None) -> None:
    if merged and aim.merged is None:
        raise ValueError(f"{aim.name} takes adapters only; a merged model needs no {aim.name}. Use 'transformers'.")
    if merged and aim.adapter is None:
        raise ValueError(f"merged (--merged) has no effect: {aim.name} takes merged models only. Leave it out.")
    if merge and r is not None:
        raise ValueError("r (--r) has no effect on a merged model, which holds the whole change. Leave it out.")
    if r is not None and r != "full" and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"r={r!r} is no rank: a whole number of at least 1, or 'full'.")
    kinds = {"onnx": "int8", "gguf": "q8_0"}
    known = kinds.get(aim.merged or "") if merge else None
    if quantise is not None and quantise != known:
        where = f"{aim.name} takes {known!r}" if known else "it is for merged models: 'int8' for onnx, 'q8_0' for GGUF"
        raise ValueError(f"quantise={quantise!r} (--quantise) has no meaning here: {where}.")


Write = Callable[[Path, Any], model_forms.Done]


def _checked(model: PeftModel, adapters: Any, aim: Target, merge: bool) -> Node:
    """What is to be written."""
    node = model.composition if adapters is None else model.checked(adapters)
    if not names(node):
        raise ValueError("No adapter is active, so there is nothing to export. Name some: adapters=, --adapters.")
    if replication_of(model.base) is not None and (merge or aim.name != "peft"):
        raise ValueError(
            f"Blocks of this base are there several times (layer_replication), which {aim.name} does not do. Make a "
            "model of its own first: coadapt merge, or merge_and_unload()."
        )
    return node


def _writer(
    aim: Target, model: PeftModel, node: Node, tokenizer: Any, merge: bool, r: Any, quantise: str | None
) -> Write:
    """What writes it, after all that can be checked was."""
    base: Any = model.get_base_model()
    if not merge:
        return adapter_forms.prepared(aim, model, node, tokenizer, r)
    refuse_unmergeable(model, node, new_biases=aim.merged == "onnx")
    match aim.merged:
        case "onnx":
            onnx.check(base)
            return lambda new, inputs: model_forms.onnx_file(new, model, node, tokenizer, inputs, quantise is not None)
        case "gguf":
            gguf.check(base, tokenizer)
            return lambda new, inputs: model_forms.gguf_file(
                new, model, node, tokenizer, inputs, quantise is not None, aim.name == "ollama"
            )
        case _:
            if not hasattr(base, "save_pretrained"):
                raise ValueError(f"{type(base).__name__} is no model of transformers, which would load the result.")
            if aim.name == "mlx":
                mlx.check_model(base)
            return lambda new, inputs: model_forms.folder(new, model, node, tokenizer, inputs, aim.name == "mlx")


def _use(aim: Target, merge: bool, form: Any, out: Path, model: PeftModel, done: model_forms.Done) -> str:
    line = aim.use_merged if merge else aim.use
    file = next((str(out / name) for name in done.main), "")
    return line.format(out=out, base=model_forms.base_name(model), file=file, room=done.room)
