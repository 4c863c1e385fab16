"""`coadapt combine`: several adapters become one adapter folder."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coadapt.cli.completion import paths, words

if TYPE_CHECKING:
    from coadapt.combining import Report
    from coadapt.model import PeftModel

WAYS = ("cat", "svd", "linear", "mean", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ab_linear")
SHARED = ("prompt", "data")
"""Facts of provenance.json that the new folder keeps where all sources agree: how it is asked, and for what."""


class Rank(click.ParamType):
    """A whole number, a share ("0.99"), or "full"."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "full":
            return value
        return (click.FLOAT if "." in str(value) else click.INT).convert(value, param, ctx)


def _invoke(
    model: str | None, adapter: tuple[str, ...], composition: str, how: str | None, out: Path, **options: Any
) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"--out {out} is there already and not empty. Choose another folder.")
    folders = _folders(adapter)
    from coadapt.cli.output import quiet
    from coadapt.formats.files import PROVENANCE
    from coadapt.model import PeftModel
    from coadapt.training.load import load_bare

    quiet()
    first = next(iter(folders.values()))
    ready = load_bare(model, first)
    view = PeftModel(ready.model)
    for name, folder in folders.items():
        _attach(view, name, folder)
    new = next(n for n in ("combined", *(f"combined-{i}" for i in range(2, 99))) if n not in view.peft_config)
    report = view.combine(composition, how, adapter_name=new, **options)
    view.set_adapter(new)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        view.save_pretrained(aside, selected_adapters=[new])
        made = aside / new
        told = json.loads((made / PROVENANCE).read_text("utf-8")) | _facts(list(folders.values()), composition, report)
        (made / PROVENANCE).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if (first / "tokenizer_config.json").is_file():
            ready.tokenizer.save_pretrained(made)
        made.chmod(0o755)
        if out.exists():
            out.rmdir()
        made.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _show(report)
    size = sum(f.stat().st_size for f in out.iterdir())
    click.echo(f"Written to {out} ({size / 1e6:.1f} MB). It is an adapter like any other:")
    click.echo(f"  coadapt generate --adapter {out} --prompt …")
    return 0


def _folders(given: tuple[str, ...]) -> dict[str, Path]:
    """Name -> folder; a folder without a name is called as it is called on the disk."""
    out: dict[str, Path] = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not equals or Path(text).exists():
            name, where = Path(text).resolve().name, text
        if name in out:
            raise click.UsageError(f"Two folders are called {name!r}; name them: --adapter one=DIR --adapter two=DIR.")
        out[name] = Path(where)
    return out


def _attach(view: "PeftModel", name: str, folder: Path) -> None:
    """The adapter in `folder` as `name`, or those of a composition by their own names."""
    from coadapt.formats.files import CHECKPOINT, COMPOSITION, read_json, settle

    if not folder.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {str(folder)!r}.")
    settle(folder)
    told = read_json(folder / COMPOSITION) if (folder / COMPOSITION).is_file() else {"adapters": ["default"]}
    if told.get("adapters") != ["default"] or (folder / CHECKPOINT).is_file():
        type(view).from_pretrained(view, folder)
    else:
        view.load_adapter(folder, name)


def _facts(folders: list[Path], composition: str, report: "Report") -> Mapping[str, Any]:
    from coadapt.formats.files import PROVENANCE, read_json

    files = [folder / PROVENANCE for folder in folders]
    told = [read_json(file) if file.is_file() else {} for file in files]
    same = {n: told[0][n] for n in SHARED if n in told[0] and all(t.get(n) == told[0][n] for t in told)}
    ways = sorted({row.how for row in report.rows})
    return {**same, "combined": {"composition": composition, "how": ways, "exact": report.exact, "apart": report.lost}}


def _show(report: "Report") -> None:
    click.echo(report.summary())
    table(report)
    for note in report.notes:
        click.echo(note)


def table(report: "Report") -> None:
    """What was done and lost, site by site; of many sites the worst."""
    from rich.table import Table

    from coadapt.cli.output import console
    from coadapt.combining.report import HEAD

    rows, rest = report.shown
    sites = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(HEAD):
        sites.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        sites.add_row(*row.cells)
    if rows:
        console().print(sites)
    if rest:
        click.echo(rest)


command = click.Command(
    "combine",
    callback=_invoke,
    help="""Make one adapter out of several.

    \b
    coadapt combine --adapter RUN "task + 0.5*style" --out DIR   # exact: the sum of ranks
    coadapt combine --adapter A --adapter b=B "A - b" --how svd --r 16 --out DIR
    coadapt combine --adapter A --adapter B "A + B" --how ties --density 0.2 --r 32 --out DIR

    RUN is a folder with several adapters, which go by their names; a folder with one goes by the folder's name, or by
    what stands before "=". Works on the true changes of the weights, whatever the methods, and says for each site
    what was lost. The result is a plain adapter folder.
    """,
    params=[
        click.Argument(["composition"]),
        click.Option(
            ["--adapter"],
            required=True,
            multiple=True,
            metavar="[NAME=]DIR",
            shell_complete=paths,
            help="Adapter folder; again for each further one.",
        ),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the first adapter names.",
        ),
        click.Option(
            ["--how"], shell_complete=words(WAYS), help=f"{', '.join(WAYS)}. Left out, the one that is exact."
        ),
        click.Option(["--r"], type=Rank(), help="Rank of the result, at most; `full`: exact; 0.99: that share."),
        click.Option(["--density"], type=float, help="Of ties, dare and magnitude_prune: the share of numbers kept."),
        click.Option(
            ["--majority-sign"], shell_complete=words(("total", "frequency")), help="Of ties: `total` or `frequency`."
        ),
        click.Option(["--seed"], type=int, help="Of what dare drops; 0 if left out."),
        click.Option(["--out"], required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty."),
    ],
)
