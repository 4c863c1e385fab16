"""`coadapt doctor`: what this machine has, what of it works, and the command that mends what does not."""

import json
import os
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from coadapt.versions import Finding

CHECKS = {
    "devices": "coadapt.training.machine:devices",
    "precision": "coadapt.training.machine:precision",
    "attention": "coadapt.training.machine:attention",
    "places": "coadapt.training.machine:places",
    "self-test": "coadapt.training.selftest:selftest",
    "quantisers": "coadapt.training.selftest:quantisers",
}
"""Part -> who looks at it. Each is imported by itself: where one cannot be loaded, that is a finding."""
SIGNS = {"ok": ("✓", "green"), "absent": ("-", "bright_black"), "warning": ("!", "yellow"), "broken": ("✗", "red")}


def _invoke(as_json: bool) -> int:
    from coadapt import versions

    shown: list[versions.Finding] = []
    if not as_json:
        click.echo(f"coadapt {import_module('coadapt').__version__}")
    for finding in _findings():
        if not as_json:
            _show(finding, new=not shown or shown[-1].part != finding.part)
        shown.append(finding)
    bad = [finding for finding in shown if finding.state == "broken"]
    if as_json:
        told = {"coadapt": import_module("coadapt").__version__, "ok": not bad}
        click.echo(json.dumps({**told, "findings": [vars(finding) for finding in shown]}, indent=2, ensure_ascii=False))
        return int(bool(bad))
    click.echo()
    if not bad:
        click.echo("All that coadapt needs works here.")
        return 0
    click.echo(f"{len(bad)} thing{'s' * (len(bad) > 1)} that coadapt needs do{'es' * (len(bad) == 1)} not work here:")
    for finding in bad:
        click.echo(f"  {finding.name}: {finding.mend or finding.said}")
    return 1


def _findings() -> Iterator["Finding"]:
    from coadapt.versions import Finding, cause, check

    told = sorted(check(), key=lambda finding: finding.part != "versions")
    yield from told
    for part, where in CHECKS.items():
        module, _, name = where.partition(":")
        try:
            if part == "self-test":
                import_module("coadapt.cli.output").quiet()
            yield from getattr(import_module(module), name)()
        except Exception as error:
            if os.environ.get("COADAPT_DEBUG"):
                raise
            first = cause(error)
            known = (f.mend for f in told if f.state != "ok" and f.name == getattr(first, "name", None))
            mend = next(known, "what is wrong with the versions above comes first")
            said = f"cannot be looked at: {type(first).__name__}: {first}"
            state = "warning" if part == "quantisers" else "broken"
            yield Finding(part=part, name=part, state=state, said=said, mend=mend)


def _show(finding: "Finding", new: bool) -> None:
    if new:
        click.secho(f"\n{finding.part}", bold=True)
    sign, color = SIGNS[finding.state]
    click.echo(f"  {click.style(sign, color)} {finding.name:15} {finding.said}")
    if finding.mend is not None and (finding.part, finding.state) != ("quantisers", "absent"):  # told above
        click.secho(f"    {'':15} {finding.mend}", dim=True)


command = click.Command(
    "doctor",
    callback=_invoke,
    help="""What this machine has, and what of it works.

    Versions of what coadapt needs and of its optional parts; devices, precision, attention and quantisers, each by
    doing it on a few kilobytes; places and free space; and a LoRA with a prompt on a model made in memory: trained for
    a step, saved and loaded. Each thing that is wrong comes with the command that mends it.

    Exits with 0 where all that is needed works, else with 1.
    """,
    params=[click.Option(["--json", "as_json"], is_flag=True, help="As JSON, for programs.")],
)
