"""`coadapt generate`: asks a base, with or without an adapter."""

import sys
from pathlib import Path
from typing import Any

import click
import yaml

from coadapt.cli.completion import paths
from coadapt.cli.options import answering


def _invoke(
    model: str | None,
    adapter: Path | None,
    adapters: str | None,
    prompt: tuple[str, ...],
    image: tuple[Path, ...],
    raw: bool,
    task: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    use_cpu: bool,
    device_map: str | None,
) -> int:
    if adapters and not adapter:
        raise click.UsageError("--adapters says which adapters of --adapter take part; give --adapter too.")
    if device_map and use_cpu:
        raise click.UsageError("--device-map says where the base lies, --use-cpu that it lies on the CPU: give one.")
    if prompt and image:
        raise click.UsageError("--prompt asks a model of texts, --image one of images: give one of them.")
    lines = () if image or sys.stdin.isatty() else sys.stdin
    prompts = prompt or tuple(line.rstrip("\n") for line in lines)
    if not prompts and not image:
        raise click.UsageError("There is no prompt: give --prompt (or --image), or one per line on the standard input.")
    from coadapt.cli.output import quiet
    from coadapt.training.ask import answer, answer_image
    from coadapt.training.load import load
    from coadapt.training.machine import chosen

    quiet()
    spread = yaml.safe_load(device_map) if device_map else None
    ready = load(model, adapter, adapters, device=chosen(use_cpu), device_map=spread)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "raw": raw}
    for file in image:
        click.echo(answer_image(ready, file, task))
    for text in prompts:
        click.echo(answer(ready, text, task=task, **options))
    return 0


command = click.Command(
    "generate",
    callback=_invoke,
    help="""Ask a model with its adapter.

    \b
    coadapt generate --adapter DIR --prompt "Once upon a time"
    coadapt generate --adapter DIR --adapters "task + 0.5*style" --prompt …

    \b
    coadapt generate --adapter DIR --image cat.png

    A prompt is put to the model as it was in training (chat template, separator). Prints answers only.
    """,
    params=[
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the adapter names.",
        ),
        click.Option(
            ["--adapter"], type=click.Path(path_type=Path), help="Adapter folder; left out, the base alone answers."
        ),
        click.Option(
            ["--adapters"], help="Which of its adapters take part, as in `task + 0.5*style`; left out, as saved."
        ),
        click.Option(
            ["--prompt"], multiple=True, help="What to ask; may be repeated. Left out, lines of standard input."
        ),
        click.Option(
            ["--image"],
            multiple=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Image to classify; may be repeated. Prints the class of each.",
        ),
        click.Option(
            ["--device-map"],
            metavar="auto|MAP",
            help="Spread the base over this machine's devices, memory and disk, as transformers' device_map does "
            "(docs/devices.md).",
        ),
        click.Option(
            ["--raw"], is_flag=True, help="Take the prompt as it is, without the frame that it had in training."
        ),
        click.Option(
            ["--task"],
            metavar="TASK",
            help="The task that is asked, by its name or number, where adapters tell tasks apart.",
        ),
        *answering(),
    ],
)
