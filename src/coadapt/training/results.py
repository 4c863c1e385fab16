"""What a run came to: the finished folder, and what is said of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coadapt.formats import checkpoint
from coadapt.formats.files import aside, saving
from coadapt.model import PeftModel
from coadapt.training import folder, processes
from coadapt.training.assemble import Processor
from coadapt.training.joint import JointTrainer
from coadapt.training.log import read_log
from coadapt.training.material import Material
from coadapt.training.picture import draw
from coadapt.training.settings import RunConfig


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    folder: Path
    step: int
    interrupted: bool
    held_out_loss: float | None
    """Of the adapters that were saved."""
    best_step: int | None
    """The step that they are of, where the best ones are kept; None where they are those of the last step."""
    view: PeftModel
    processor: Processor
    material: Material


def finish(
    run: RunConfig, trainer: JointTrainer, view: PeftModel, material: Material, out: Path, interrupted: bool
) -> Outcome:
    """Writes the folder, unless the run was interrupted, and says what it has."""
    state = trainer.state
    log = read_log(out / folder.METRICS)
    held_out = [line["eval/loss"] for line in log if "eval/loss" in line]
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    whole = run.early_stopping_patience is not None and not run.stops_by_adapter
    best_step = state.best_global_step if best and whole and not interrupted else None
    if processes.first():
        folder.link(out, "last", out / f"checkpoint-{state.global_step}")
        folder.link(out, "best", best)
    if not interrupted and processes.first():
        with saving(out) as new:
            material.processor.save_pretrained(new.folder)
        with aside(out / folder.PICTURE) as file:
            draw(log, file, title(run))
        figures = _figures(trainer, log, material, best_step)
        kept = checkpoint.read(view.get_extra_state())["base_fingerprint"]  # of a base that may lie in parts by now
        base = {"name": run.model, "fingerprint": kept}
        how = {"quantisation": run.quantisation} if run.quantisation else {}
        folder.write_provenance(out, **material.facts(), **how, base=base, figures=figures)
        view.save_pretrained(out)  # last: where an adapter is found, all that belongs to it is there
    return Outcome(
        folder=out,
        step=state.global_step,
        interrupted=interrupted,
        held_out_loss=state.best_metric if best_step is not None else held_out[-1] if held_out else None,
        best_step=best_step,
        view=view,
        processor=material.processor,
        material=material,
    )


def title(run: RunConfig) -> str:
    """Base, methods and data, for the picture."""
    methods = " + ".join(a.method for a in run.adapters.values())
    data = ", ".join(run.datasets) or Path(str(run.data)).name
    return f"{Path(run.model).name} · {methods} · {data}"


def stopped(run: RunConfig, done: Outcome, trainer: JointTrainer) -> list[str]:
    """Of which step the saved adapters are, where that is not the last."""
    if done.interrupted:
        return []
    if done.best_step is None:
        return [f"{name}: {said}" for name, said in trainer.course.told().items()]
    early = (
        f"Stopped early, at step {done.step} of {trainer.state.max_steps}: no better held-out loss in "
        f"{run.early_stopping_patience} evaluations."
        if done.step < trainer.state.max_steps
        else f"Trained to the end, step {done.step}."
    )
    return [
        f"\n{early} Saved are the best adapters, of step {done.best_step} (held-out loss {done.held_out_loss:.4f})."
    ]


def _figures(
    trainer: JointTrainer, log: list[dict[str, Any]], material: Material, best: int | None
) -> Mapping[str, Any]:
    held_out = {line["step"]: line["eval/loss"] for line in log if "eval/loss" in line}
    train = [line["train/loss"] for line in log if "train/loss" in line]
    tallies = [part.made.tally for part in material.parts.values()]
    figures: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "training rows": sum(tally.rows for tally in tallies),
    }
    tokens = sum(tally.tokens for tally in tallies)
    figures |= {"tokens of training data": tokens} if tokens else {}
    figures |= {"last training loss": round(train[-1], 4)} if train else {}
    figures |= {} if best is None else {"saved": f"the best adapters, of step {best}"}
    figures |= trainer.course.told()
    for name in trainer.mixture.sets if trainer.several else ():
        if losses := [line[f"eval/{name}/loss"] for line in log if f"eval/{name}/loss" in line]:
            figures[f"held-out loss of {name}"] = f"{losses[0]:.4f} → {losses[-1]:.4f}"
    if not held_out:
        return figures
    first, last = next(iter(held_out.values())), list(held_out.values())[-1]
    saved = last if best is None else held_out[best]
    return figures | {"held-out loss": f"{first:.4f} → {saved:.4f}"}
