"""`coadapt search`: the best combination of methods, sites, ranks, lengths, gates and rates on one data set."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from coadapt.cli.compare import carried_out, hidden, options, shown
from coadapt.cli.train import built, read_values
from coadapt.tuning.space import SearchConfig

OWN: dict[str, str] = {
    "methods": "LIST",
    "mixes": "NUMBER",
    "gates": "",
    "trials": "NUMBER",
    "time": "TIME",
    "budget": "STEPS",
    "max_parameters": "NUMBER",
    "objectives": "LIST",
    "together": "NUMBER",
    "sampler": "tpe|random",
    "prune": "",
    "storage": "URL|FILE",
    "study": "NAME",
    "validation_split": "NUMBER",
    "out": "DIR",
}
"""Flag -> what stands for its value; nothing where it is a switch."""


def _invoke(config: Path | None, overrides: tuple[str, ...], as_json: bool, **flags: Any) -> int:
    plan = built(lambda: _read(config, overrides, flags))
    if find_spec("optuna") is None:
        raise click.UsageError('search needs Optuna: pip install "coadapt[search]"')
    from coadapt.tuning.findings import plain, tell, write
    from coadapt.tuning.search import search

    found = carried_out(lambda console: search(plan, console), as_json)
    if found is None:
        return 1
    write(found, plan.out)
    shown(found, plain, tell, as_json)
    return 0


def _read(config: Path | None, overrides: tuple[str, ...], flags: dict[str, Any]) -> SearchConfig:
    plan = SearchConfig.read(read_values(config, flags, overrides))
    plan.check()
    return plan


command = click.Command(
    "search",
    callback=_invoke,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
    help="""Find the best combination of methods, sites, ranks and rates.

    \b
    coadapt search --model DIR_OR_ID --data FILE --methods lora,prompt,bottleneck
                   --budget 200 --trials 30 --out DIR

    Optuna proposes candidates and learns from those that were trained; they are judged by validation rows. At the end
    best.yaml holds the best one as settings of `coadapt train`, and it is trained once more, with another seed, and
    scored on rows that no candidate was judged by. Stopped or killed, the same command goes on.

    Every setting of `coadapt train` (see its --help) is taken as well, and holds for all trainings. More in
    docs/searching.md.
    """,
    params=[
        click.Argument(["overrides"], nargs=-1, metavar="[NAME=VALUE]..."),
        click.Option(
            ["--config"], type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file with settings."
        ),
        *options(SearchConfig, OWN),
        *hidden(OWN),
        click.Option(["--json", "as_json"], is_flag=True, help="Print search.json, and progress on standard error."),
    ],
)
