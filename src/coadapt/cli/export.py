"""`coadapt export`: an adapter for the program that is to run it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coadapt.cli.combine import Rank, table
from coadapt.cli.completion import paths, words
from coadapt.cli.options import WrongInput

if TYPE_CHECKING:
    from coadapt.exporting import Exported

TARGETS = ("peft", "transformers", "vllm", "tgi", "llamacpp", "ollama", "mlx", "onnx")
ALIASES = {"llama.cpp": "llamacpp", "gguf": "llamacpp", "mlx-lm": "mlx", "onnxruntime": "onnx", "hf": "transformers"}
"""What people also call them."""


class TargetName(click.ParamType):
    """One of TARGETS."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from coadapt.config import did_you_mean

        name = ALIASES.get(str(value).lower(), str(value).lower().replace(".", ""))
        if name in TARGETS:
            return name
        return self.fail(f"{value!r} is none of {', '.join(TARGETS)}.{did_you_mean(name, TARGETS)}", param, ctx)


def _invoke(
    folder: Path,
    target: str,
    out: Path | None,
    model: str | None,
    adapters: str | None,
    merged: bool,
    r: Any,
    quantise: str | None,
    overwrite: bool,
    use_cpu: bool,
    as_json: bool,
) -> int:
    from coadapt.cli.output import quiet
    from coadapt.exporting import export
    from coadapt.exporting.placing import refuse_taken
    from coadapt.training.load import load
    from coadapt.training.machine import chosen

    quiet()
    where = out or folder.with_name(f"{folder.resolve().name}-{target}")
    try:
        refuse_taken(where, overwrite)
        if where.resolve() == folder.resolve():
            raise ValueError(f"--out {where} is the folder that is exported. Choose another.")
        ready = load(model, folder, adapters, device=chosen(use_cpu))
        view: Any = ready.model
        done = export(
            view,
            target,
            where,
            tokenizer=ready.processor,
            merged=merged,
            r=r,
            quantise=quantise,
            overwrite=overwrite,
            provenance=folder,
        )
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise WrongInput(str(error)) from error
    if as_json:
        click.echo(json.dumps(_plain(done), indent=2, ensure_ascii=False))
    else:
        _show(done)
    return 0


def _show(done: "Exported") -> None:
    from coadapt.exporting.showing import lines

    first, *rest = lines(done)
    click.echo(first)
    if done.report is not None and not done.report.exact:
        table(done.report)
    for line in rest:
        click.echo(line)


def _plain(done: "Exported") -> dict[str, Any]:
    from coadapt.exporting.model_forms import told

    return {
        "out": str(done.out),
        "target": done.target,
        "merged": done.merged,
        "composition": done.composition,
        "files": dict(done.files),
        "use": done.use,
        **told(done),
    }


command = click.Command(
    "export",
    callback=_invoke,
    help=f"""Write an adapter for vLLM, llama.cpp, Ollama, MLX, ONNX …

    \b
    coadapt export DIR --for vllm            one plain LoRA, every scale within B
    coadapt export DIR --for llamacpp        adapter.gguf, for --lora
    coadapt export DIR --for llamacpp --merged        model.gguf, with tokenizer
    coadapt export DIR --for onnx --quantise int8     for onnxruntime, no PyTorch

    DIR is an adapter folder, a composition, or a checkpoint of transformers' Trainer. Targets: {", ".join(TARGETS)}.
    IA3, DoRA and copies of layers become the best LoRA of rank --r, and how far that is off is told. What a target
    cannot take is refused by name.
    """,
    params=[
        click.Argument(["folder"], type=click.Path(path_type=Path), metavar="DIR"),
        click.Option(
            ["--for", "target"],
            required=True,
            type=TargetName(),
            shell_complete=words(TARGETS),
            help=f"{', '.join(TARGETS)}.",
        ),
        click.Option(
            ["--out"], type=click.Path(path_type=Path), help="Folder to write; left out, DIR-TARGET beside DIR."
        ),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the adapter names.",
        ),
        click.Option(["--adapters"], help="Which adapters, as in `task + 0.5*style`; left out, as saved."),
        click.Option(["--merged"], is_flag=True, help="The merged model, where the target takes adapters, too."),
        click.Option(
            ["--r"], type=Rank(), help="Largest rank of the LoRA, or `full`; left out, 16 for what has no factors."
        ),
        click.Option(
            ["--quantise", "--quantize"],
            shell_complete=words(("int8", "q8_0")),
            help="int8 for onnx; q8_0 for llamacpp and ollama with --merged.",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace a folder that export wrote before."),
        click.Option(["--use-cpu"], is_flag=True, help="Do not use a GPU even if there is one."),
        click.Option(["--json", "as_json"], is_flag=True, help="What was done, for machines."),
    ],
)
