"""What comparisons are told, and what searches are told like them. Importing this file imports no torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coadapt.config import did_you_mean
from coadapt.training.settings import RunConfig
from coadapt.training.vocabulary import renamed
from coadapt.tuning.candidates import candidates_of

TIME = re.compile(r"(\d+\.?\d*)\s*(s|m|h)")
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
HELD_OUT = 0.2
"""Share of the rows that are scored at the end, where the data has no held-out part: more than a run looks at."""


class Budget(BaseModel):
    """What each training may take: so many steps, or so many seconds of steps."""

    model_config = ConfigDict(frozen=True)

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def read(cls, text: str | int) -> Self:
        """`300` or `300 steps`; `90s`, `5m`, `1h`.

        Raises:
            ValueError: it is neither.
        """
        words = str(text).strip().lower().removesuffix("steps").strip()
        if words.isdecimal() and int(words):
            return cls(steps=int(words))
        if (found := TIME.fullmatch(words)) and float(found[1]):
            return cls(seconds=float(found[1]) * SECONDS[found[2]])
        raise ValueError(f"budget={text!r} is neither a number of steps (300) nor a time (90s, 5m, 1h).")

    def __str__(self) -> str:
        return (
            f"{self.steps} steps" if self.steps else f"{self.seconds:g} seconds of steps" if self.seconds else "epochs"
        )


class Trainings(BaseModel):
    """What many trainings on one data set have in common. Beside these stand the settings of `coadapt train`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    methods: list[str] = Field(default_factory=list)
    """Methods and mixes, as in lora,prompt,lora+prompt."""
    budget: str | None = None
    """What each training may take: steps (300), or time (90s, 5m, 1h), from which the steps of each are found by its
    speed. Left out: max_steps or num_train_epochs."""
    validation_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows that rates are chosen by; they are not trained on, nor scored."""
    out: Path
    """Folder of all of it; the same command goes on with what is there."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Those of `coadapt train`."""

    @field_validator("methods", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return words(given)

    @field_validator("budget", mode="before")
    @classmethod
    def _readable(cls, given: Any) -> Any:
        if given is not None:
            Budget.read(given)
        return None if given is None else str(given)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        lengths = [name for name in ("max_steps", "num_train_epochs", "epochs") if name in self.settings]
        if self.budget and lengths:
            raise ValueError(f"budget and {lengths[0]} both say how long a training is: give one of them.")
        return self

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """From names with values: the fields above, and beside them the settings of a run.

        Raises:
            ValueError: what does not fit, all of it listed.
        """
        own = {name: value for name, value in values.items() if name in cls.model_fields and name != "settings"}
        if "out" not in own:
            raise ValueError("out is missing: the folder that everything goes to.")
        rest = renamed({name: value for name, value in values.items() if name not in own})
        try:
            return cls(**own, settings={"eval_split": HELD_OUT, **rest})
        except ValidationError as error:
            raise ValueError("\n".join(map(_line, error.errors()))) from error

    @property
    def limit(self) -> Budget | None:
        """The budget of each training, where one is told."""
        return None if self.budget is None else Budget.read(self.budget)

    @property
    def common(self) -> dict[str, Any]:
        """The settings of every run, the number of its steps among them where that is told."""
        length = {"max_steps": self.limit.steps} if self.limit and self.limit.steps else {}
        return {**self.settings, **length}

    def plain(self) -> dict[str, Any]:
        """As values that build it again."""
        return self.model_dump(mode="json", exclude={"out"})


def words(given: Any) -> Any:
    """`a,b` as a list; a list as it is."""
    return [word.strip() for word in given.split(",") if word.strip()] if isinstance(given, str) else given


class CompareConfig(Trainings):
    """A comparison."""

    candidates: dict[str, Any] = Field(default_factory=dict)
    """In YAML: names with the settings of each, as in {small: {method: lora, r: 4}}, beside methods or in their
    place."""
    seeds: int = Field(default=3, ge=1)
    """Trainings of each with other seeds, which give the spread."""
    rates: int = Field(default=3, ge=1)
    """Learning rates tried for each first, an odd number: 3 is a third of the default, the default, three times it."""
    score: str | None = None
    """What the held-out rows are scored by: loss, accuracy, exact_match, rouge1, rouge2 or rougeL. Left out: the
    accuracy of a classification, otherwise the loss."""

    @field_validator("score")
    @classmethod
    def _a_mean(cls, given: str | None) -> str | None:
        if given == "perplexity":
            raise ValueError("score=perplexity is the exponential of the loss: take score=loss")
        return given

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.rates % 2 == 0:
            raise ValueError(f"rates={self.rates} has no middle, where the default rate stands: take an odd number.")
        return self

    @property
    def runs(self) -> dict[str, RunConfig]:
        """Name -> the run of each candidate, less what a comparison decides."""
        return candidates_of(self.common, self.methods, self.candidates)

    @property
    def factors(self) -> list[float]:
        """What the default rates are multiplied by, one after another."""
        half = self.rates // 2
        return [3.0**power for power in range(-half, half + 1)]


def _line(found: Any) -> str:
    where = ".".join(map(str, found["loc"]))
    message = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        message = f"is no setting.{did_you_mean(where, Trainings.model_fields)}"
    return f"{where}: {message}" if where and not message.startswith(where) else message
