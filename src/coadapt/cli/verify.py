"""`coadapt verify`: tries one step with an adapter, and says what does not train."""

from pathlib import Path
from typing import Any

import click


def _invoke(model: str | None, adapter: Path, adapters: str | None, prompt: str) -> int:
    import torch

    from coadapt.cli.output import quiet
    from coadapt.model import PeftModel
    from coadapt.training.ask import classifies, tokens
    from coadapt.training.load import load

    quiet()
    ready = load(model, adapter, adapters)
    view: Any = ready.model
    assert isinstance(view, PeftModel)
    for name in view.active_adapters:
        view.unfreeze(name)
    batch = tokens(ready, prompt, special=True)
    labels = torch.zeros_like(batch["input_ids"][:, 0]) if classifies(view) else batch["input_ids"].clone()
    report = view.verify({**batch, "labels": labels})
    click.echo(str(report))
    return 0 if report else 1


command = click.Command(
    "verify",
    callback=_invoke,
    help="""Try one step with an adapter: does everything train?

    \b
    coadapt verify --adapter DIR

    Each adapter must change the output, get a gradient and be changed by a step; nothing frozen may change; disabled,
    merged, and saved and loaded, it must give what it should. Nothing is written. Exit code 1 where something fails.
    """,
    params=[
        click.Option(["--model"], help="The base: a folder or a hub id; left out, the one that the adapter names."),
        click.Option(["--adapter"], type=click.Path(path_type=Path), required=True, help="Adapter folder."),
        click.Option(["--adapters"], help="Which take part, as in `task + 0.5*style`; left out, as saved."),
        click.Option(
            ["--prompt"],
            default="The quick brown fox jumps over the lazy dog.",
            show_default=True,
            help="What the step is tried on.",
        ),
    ],
)
