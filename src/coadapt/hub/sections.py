"""The text of a card that follows from the folder, section by section."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from coadapt.config import PeftConfig
from coadapt.formats.facts import Facts
from coadapt.formats.package import PICTURE
from coadapt.formats.programs import PROGRAMS, Verdict
from coadapt.hub.figures import scores, table, training
from coadapt.hub.licences import UNKNOWN
from coadapt.hub.snippets import snippets
from coadapt.hub.story import Story
from coadapt.training.inspect import Found

NOT_SAID = frozenset(
    """adapter_name base_model_name_or_path inference_mode peft_type revision target_modules task_type token_dim
    num_transformer_submodules num_attention_heads num_layers""".split()
)
"""Options that another column of the card has, or none needs."""
SHOWN = 8
"""Kinds of places that are named, at most."""


def title(story: Story) -> str:
    """Base and methods."""
    methods = " + ".join(name.replace("-", " ") for name in story.methods)
    return f"{Path(story.base or 'a base').name} · {methods}"


def body(story: Story, licence: str) -> str:
    """All sections."""
    parts = [
        _introduction(story),
        *("## What it is", _adapters(story)),
        *("## How to use it", *_use(story)),
        *("## Scores", *scores(story)),
        *("## How it was trained", *_training(story, licence)),
        *("## Which programs load it", _programs(story)),
        *("## Versions", _versions(story)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(story: Story) -> str:
    count = len(story.facts)
    base = f"[{story.base}](https://huggingface.co/{story.base})" if story.base_is_on_hub else f"`{story.base}`"
    what = "An adapter" if count == 1 else f"{count} adapters"
    data = ", ".join(f"`{one['name']}`" for one in story.data.values())
    trained = f", trained by coadapt on {data}" if data else ""
    numbers = sum(one.numbers for one in story.contents.adapters)
    whole = story.parameters_of_base
    share = f", {numbers / whole:.2%} of the base's {whole:,}" if whole else ""
    active = f" Active: `{story.contents.composition}`." if story.is_composition else ""
    named = base if story.base else "a base that the folder does not name"
    return f"{what} for {named}{trained}: {numbers:,} parameters{share}.{active}"


def _adapters(story: Story) -> str:
    runs: dict[str, dict[str, Any]] = story.run.get("adapters") or {}
    rows = [
        (
            f"`{found.name}`",
            facts.kind.lower().replace("_", "-"),
            _places(found),
            f"{found.numbers:,}",
            ", ".join(f"{k}={v}" for k, v in (_told(runs.get(found.name)) or _options(found.config)).items()),
            f"{runs[found.name]['learning_rate']:g}" if "learning_rate" in runs.get(found.name, {}) else "",
        )
        for found, facts in zip(story.contents.adapters, story.facts, strict=True)
    ]
    return table(["adapter", "method", "places", "parameters", "options", "learning rate"], rows)


def _places(found: Found) -> str:
    """How many places, and which, by the last part of their names."""
    count = sum(site.count for site in found.sites)
    names = list(dict.fromkeys(site.name.rpartition(".")[2] for site in found.sites if site.name))
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return f"{count} ({', '.join([*names[:SHOWN], *more])})" if names else "the input"


def _told(settings: dict[str, Any] | None) -> dict[str, Any]:
    """The options of an adapter in a run's settings."""
    return {k: v for k, v in (settings or {}).items() if k not in ("method", "learning_rate") and v != 0.0}


def _options(config: PeftConfig) -> dict[str, Any]:
    """What is not at its default."""
    fields = [field for field in dataclasses.fields(config) if field.name not in NOT_SAID]
    found = {field.name: getattr(config, field.name) for field in fields if field.default is not dataclasses.MISSING}
    plain = {field.name: field.default for field in fields}
    return {name: value for name, value in found.items() if value not in (None, (), [], {}) and value != plain[name]}


def _use(story: Story) -> Iterator[str]:
    yield from (f"```{kind}\n{text}```" for kind, text in snippets(story))
    if not story.base_is_on_hub:
        yield f"The base, `{story.base}`, is known to this card by the name of its folder only: put its place there."


def _training(story: Story, licence: str) -> Iterator[str]:
    rows = [*training(story), ("licence of the data", f"**{UNKNOWN}**" if licence == UNKNOWN else licence)]
    if not story.run and not story.data:
        yield "No run is recorded in this folder."
    yield table(["", ""], rows)
    if story.has_picture:
        yield f"![The loss over the steps]({PICTURE})"
    if story.run:
        settings = yaml.safe_dump(dict(story.run), sort_keys=False, allow_unicode=True)
        yield (
            "`coadapt train --config run.yaml`, with this `run.yaml` (what is not in it was at its default):\n\n"
            f"```yaml\n{settings}```"
        )


def _programs(story: Story) -> str:
    """A row for each program, a column for each adapter."""
    judged = [[program.judge(facts) for program in PROGRAMS] for facts in map(partial(_shown, story), story.facts)]
    rows = [(program.name, *(_answer(of_one[number]) for of_one in judged)) for number, program in enumerate(PROGRAMS)]
    whole = ["Together they are loaded by coadapt only; by themselves:"] if story.is_composition else []
    heads = [f"`{facts.name}`" for facts in story.facts] if story.is_composition else ["as it is"]
    return "\n\n".join([*whole, table(["program", *heads], rows)])


def _shown(story: Story, facts: Facts) -> Facts:
    """As others will find it."""
    inside = "DIR" if facts.folder == story.folder else f"DIR/{facts.name}"
    return replace(facts, folder=Path(inside), config={**facts.config, "base_model_name_or_path": story.base})


def _answer(verdict: Verdict) -> str:
    mend = f": `{verdict.command}`" if verdict.command else ""
    return "yes" if verdict.loads else f"no: {'; '.join(verdict.reasons)}{mend}"


def _versions(story: Story) -> str:
    known = {name: version for name, version in (story.provenance.get("versions") or {}).items() if version}
    said = ", ".join(f"{name} {version}" for name, version in known.items())
    mark = (story.provenance.get("base") or {}).get("fingerprint")
    return f"{said or 'Not recorded'}.{f' Fingerprint of the base: `{mark}`.' if mark else ''}"
