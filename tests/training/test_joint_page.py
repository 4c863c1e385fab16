"""The example of docs/joint_training.md is one that can be run as it stands."""

import re
from pathlib import Path

import yaml

from coadapt.training.settings import RunConfig
from coadapt.training.timetable import Span, timetable

PAGE = Path(__file__).parents[2] / "docs" / "joint_training.md"


def test_the_example_of_the_page_is_a_run() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    run = RunConfig(**yaml.safe_load(text))
    table = timetable(run)
    assert table.datasets == {"records": Span(stop=150), "lists": Span(), "on-top": Span(start=150)}
    assert run.stops_by_adapter
    assert RunConfig(**run.plain()) == run
