"""`coadapt merge`: an adapter becomes part of its base's weights."""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from coadapt.cli.completion import paths

ORIGINAL = "original"


def _merged(ready: Any, into: str | None, other: Callable[[], Any]) -> Any:
    """The base of `ready` with its adapters in its weights; says what was lost where it was quantised.

    Args:
        other: makes the view again on the base without its being quantised.
    """
    from coadapt.core.repacking import apart

    if into != ORIGINAL:
        merged = ready.model.merge_and_unload(into=into)
        if ready.model.merge_report is not None:
            click.echo(ready.model.merge_report)
        return merged
    report = ready.model.merge_adapter()
    if report is None:
        raise click.UsageError("--into original: the base was not quantised for this adapter. Leave it out.")
    ready.model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was trained on a base with other weights")  # so it was asked
        view = other()
    lost, off = apart(ready.model.get_base_model(), view.get_base_model(), report)
    click.echo(f"{report.told(ORIGINAL)}\n  lost so ({ORIGINAL}): {lost:.1e} of the change, {off:.1e} of the weights")
    return view.merge_and_unload()


def _streamed(model: str | None, adapter: Path, adapters: str | None, aside: Path) -> Any:
    """Merges into `aside` without ever holding the base; gives what turns text into tokens."""
    from coadapt.exporting.streaming import merge_to
    from coadapt.model import PeftModel
    from coadapt.training.load import load
    from coadapt.training.machine import chosen

    with tempfile.TemporaryDirectory(prefix=".coadapt-", dir=aside.parent) as waiting:
        ready = load(model, adapter, adapters, device=chosen(True), on_disk=Path(waiting))
        assert isinstance(ready.model, PeftModel)
        largest = merge_to(ready.model, aside)
    click.echo(f"One weight at a time; the largest takes {largest / 1e6:.1f} MB.")
    return ready.processor


def _in_memory(
    model: str | None, adapter: Path, adapters: str | None, aside: Path, use_cpu: bool, into: str | None
) -> Any:
    from coadapt.model import PeftModel
    from coadapt.training.load import load
    from coadapt.training.machine import chosen

    ready = load(model, adapter, adapters, device=chosen(use_cpu))
    assert isinstance(ready.model, PeftModel)
    merged = _merged(ready, into, lambda: load(model, adapter, adapters, device=chosen(use_cpu), quantised=False).model)
    merged.save_pretrained(aside)
    return ready.processor


def _invoke(
    model: str | None, adapter: Path, adapters: str | None, out: Path, use_cpu: bool, into: str | None, stream: bool
) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"--out {out} is there already and not empty. Choose another folder.")
    if stream and (into or use_cpu):
        raise click.UsageError("--stream merges on the CPU, into a base that is not quantised: leave out the others.")
    from coadapt.cli.output import quiet
    from coadapt.formats.files import PROVENANCE
    from coadapt.training.load import asking

    quiet()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".coadapt-writing.{out.name}")  # always the same: remains of a killed process go with it
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        if stream:
            processor = _streamed(model, adapter, adapters, aside)
        else:
            processor = _in_memory(model, adapter, adapters, aside, use_cpu, into)
        processor.save_pretrained(aside)
        if (adapter / PROVENANCE).is_file():  # it says how prompts were put in training
            shutil.copy(adapter / PROVENANCE, aside)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(f.stat().st_size for f in out.iterdir())
    click.echo(f"Merged into {out} ({size / 1e6:.1f} MB). It is a model of its own now:")
    click.echo(f"  coadapt generate --model {out} {asking(processor)}")
    return 0


command = click.Command(
    "merge",
    callback=_invoke,
    help="""Put an adapter into the weights of its base.

    The result is a plain model, as fast as the base, that every program loads. Prompts, prefixes and bottlenecks are no
    changes of weights and cannot be merged.

    Where the base was quantised for the training, --into says what the result is, and what is lost is told: the base as
    the adapter knows it, in floats (dequantised, the default); the same, quantised anew; or the original base, without
    what quantising had changed in it.
    """,
    params=[
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the adapter names.",
        ),
        click.Option(["--adapter"], required=True, type=click.Path(path_type=Path), help="Adapter folder."),
        click.Option(
            ["--adapters"], help="Which of its adapters to merge, as in `task + 0.5*style`; left out, as saved."
        ),
        click.Option(["--out"], required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty."),
        click.Option(
            ["--into"],
            type=click.Choice(["dequantised", "quantised", ORIGINAL]),
            help="Of a base that was quantised for the training: which one to merge into.  [dequantised]",
        ),
        click.Option(
            ["--stream"],
            is_flag=True,
            help="One weight at a time, from file to file: for a base that is larger than memory. Writes the same.",
        ),
        click.Option(["--use-cpu"], is_flag=True, help="Do not use a GPU even if there is one."),
    ],
)
