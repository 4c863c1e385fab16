"""`coadapt convert`: an adapter from one program's file to another's."""

from pathlib import Path

import click

from coadapt.cli.completion import paths
from coadapt.cli.options import WrongInput

FORMS = ("peft", "loralib", "kohya", "diffusers", "safetensors")


def _invoke(
    source: Path,
    out: Path,
    to: str,
    alpha: float | None,
    enable: str | None,
    model: str | None,
    trust_pickle: Path | None,
) -> int:
    from coadapt.formats.foreign.converting import Form, Options, convert

    said = None if enable is None else [flag.strip() in ("1", "true", "True") for flag in enable.split(",")]
    form: Form = to  # type: ignore[assignment]
    try:
        done = convert(source, out, form, Options(alpha=alpha, enable=said, base=model, trusted=trust_pickle))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise WrongInput(str(error)) from error
    what = f"{done.layers} layers of {done.form}'s form" if done.layers else "The same tensors as safetensors"
    click.echo(f"{what}, written to {', '.join(map(str, done.out))}.")
    return 0


command = click.Command(
    "convert",
    callback=_invoke,
    help="""Read an adapter of another program, and write it for a third.

    \b
    coadapt convert style.safetensors style --to peft          of kohya, LyCORIS, diffusers
    coadapt convert lora.safetensors out --to peft --alpha 32  of loralib
    coadapt convert style lora.safetensors --to kohya

    IN is a file, or a folder of peft; what it is, it tells itself. Of a pipeline each part (unet, text_encoder …)
    becomes a folder of its own. Weights that are pickles are read only if --trust-pickle names them; --to safetensors
    rewrites the folder or file that holds one.
    """,
    params=[
        click.Argument(["source"], type=click.Path(path_type=Path), metavar="IN"),
        click.Argument(["out"], type=click.Path(path_type=Path), metavar="OUT"),
        click.Option(["--to"], required=True, type=click.Choice(FORMS), help="The form to write."),
        click.Option(["--alpha"], type=float, help="Of loralib: its lora_alpha, which the file does not hold."),
        click.Option(["--enable"], help="Of loralib: its enable_lora of layers that are several in one, as in 1,0,1."),
        click.Option(["--model"], shell_complete=paths, help="The base that the written folder is to name."),
        click.Option(["--trust-pickle"], type=click.Path(path_type=Path), help="The one pickle that may be read."),
    ],
)
