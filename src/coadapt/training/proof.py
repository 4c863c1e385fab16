"""Before the first step: one is tried, on rows of each data set, and everything put back."""

from rich.console import Console
from rich.text import Text

from coadapt.model import PeftModel
from coadapt.training.material import Material
from coadapt.training.timetable import Timetable
from coadapt.verifying import Finding

ROWS = 2
"""Of each data set."""


def prove(view: PeftModel, table: Timetable, material: Material, console: Console) -> None:
    """Tries one step with the composition of each data set, on rows of it, and says what it found.

    Raises:
        ValueError: an adapter would not train, or something frozen would.
    """
    active, collate, several = view.composition, material.collator(), len(material.parts) > 1
    failed: list[Finding] = []
    try:
        for name, part in material.parts.items():
            rows = part.made.train
            batch = collate([rows[i] for i in range(min(len(rows), ROWS))])
            if several:
                view.set_adapter(table.compositions[name])
                view.trainable(*table.uses(name))
            failed += view.verify(batch, merge=False).failed
    finally:
        if several:
            view.set_adapter(active)
            view.unfreeze()
    if in_vain := [str(f) for f in failed if f.grave]:
        raise ValueError(
            "\n".join(["One step was tried, and training would be in vain (verify=false goes on):", *in_vain])
        )
    for finding in failed:
        console.print(Text(str(finding), "yellow"))
    told = "one step was tried: every adapter changes the output, gets a gradient and moves; nothing else does"
    console.print(Text("one step was tried; the rest of it is well" if failed else told, "dim"), "")
