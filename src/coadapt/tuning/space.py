"""What a search chooses from, and a choice as the settings of a run. Importing this file imports no torch."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coadapt.training.options import default_options, method_named
from coadapt.tuning.candidates import candidates_of
from coadapt.tuning.plan import Budget, Trainings, words

SITES = ["all-linear", "attention", "mlp"]
RATE = "rate"
"""What the method's default learning rate is multiplied by."""


class Range(BaseModel):
    """Numbers from the one to the other; whole ones, where both ends are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: int | float
    high: int | float
    log: bool = True

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"a range goes from low up to high, and from above 0 where log is on; got {self!r}")
        return self


Choices = Mapping[str, Sequence[Any] | Range]
"""Option -> its values."""

SPACES: Mapping[str, Choices] = {
    "lora": {"r": [2, 4, 8, 16, 32], "target_modules": SITES},
    "dora": {"r": [2, 4, 8, 16, 32], "target_modules": SITES},
    "prompt_tuning": {"num_virtual_tokens": Range(low=4, high=40)},
    "prefix_tuning": {"num_virtual_tokens": Range(low=4, high=40)},
    "p_tuning": {"num_virtual_tokens": Range(low=4, high=40)},
    "bottleneck": {"reduction_factor": [4, 8, 16, 32], "placement": ["pfeiffer", "houlsby", "parallel"]},
}
"""What is searched where nothing is said; of every method its learning rate, too."""
RATES = Range(low=0.1, high=10.0)


class Draws(Protocol):
    """What suggests values: Optuna's trial."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


class SearchConfig(Trainings):
    """A search."""

    methods: list[str] = Field(default_factory=list)
    """Methods to choose from, as in lora,prompt,bottleneck."""
    budget: str | None = None
    """Steps of each training. Left out: max_steps or num_train_epochs."""
    validation_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows that candidates are judged by; they are not trained on."""
    mixes: int = Field(default=2, ge=1)
    """The most methods in one mix."""
    gates: bool = True
    """Whether a mix may have learned gates before its adapters."""
    space: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """In YAML: method, option and its values, as in {lora: {r: [4, 8], rate: {low: 0.3, high: 3}}}, in place of the
    usual ones; rate multiplies the default learning rate."""
    trials: int | None = Field(default=None, ge=1)
    """Trainings in all. Left out, with no time told: 20."""
    time: str | None = None
    """Time for all trainings together (90s, 30m, 2h)."""
    max_parameters: int | None = Field(default=None, ge=1)
    """Candidates with more parameters to train are not trained."""
    objectives: list[str] = Field(default_factory=lambda: ["loss"])
    """What is to be good: the validation rows' loss (or accuracy, exact_match, rougeL), and with it parameters, memory
    or latency; with several, the best compromises are found."""
    together: int = Field(default=1, ge=1)
    """Candidates that are trained in one run, side by side in each batch; without pruning."""
    sampler: str = "tpe"
    """tpe learns from what was trained; random does not."""
    prune: bool = True
    """Whether a training is ended that is worse than most were at that step; of one objective."""
    storage: str | None = None
    """Where Optuna keeps the study: a database (postgresql://..., mysql://..., sqlite:///FILE), or the file of a
    journal. Many machines with one storage and one name work on one study. Left out: SQLite in out."""
    study: str = "coadapt"
    """The study's name in the storage."""

    @field_validator("objectives", mode="before")
    @classmethod
    def _words(cls, given: Any) -> Any:
        return words(given)

    @field_validator("time")
    @classmethod
    def _time(cls, given: str | None) -> str | None:
        if given is not None and Budget.read(given).seconds is None:
            raise ValueError(f"time={given!r} is no time: 90s, 30m, 2h")
        return given

    @model_validator(mode="after")
    def _searching(self) -> Self:
        if not self.methods:
            raise ValueError("methods is missing: what to choose from, as in lora,prompt,bottleneck.")
        if self.limit is not None and self.limit.seconds is not None:
            raise ValueError(
                f"budget={self.budget!r}: in a search each training has so many steps; time is of them all."
            )
        if self.sampler not in ("tpe", "random"):
            raise ValueError(f"sampler={self.sampler!r} is neither tpe nor random.")
        costs = [name for name in self.objectives if name in COSTS]
        if len(self.objectives) - len(costs) != 1 or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(
                f"objectives={','.join(self.objectives)}: one score (loss, accuracy, ...), and beside it any of "
                f"{', '.join(COSTS)}, each once."
            )
        if self.together > 1 and (late := [name for name in costs if name != "parameters"]):
            raise ValueError(
                f"together={self.together}: {late[0]} is measured of one candidate at a time. Set it to 1."
            )
        return self

    @property
    def score(self) -> str:
        """The objective that is a score."""
        return next(name for name in self.objectives if name not in COSTS)

    @property
    def seconds(self) -> float | None:
        """The time for all."""
        return None if self.time is None else Budget.read(self.time).seconds

    @property
    def most(self) -> int | None:
        """Trainings in all; None: as many as there is time for."""
        return self.trials or (None if self.time else 20)

    @property
    def pruned(self) -> bool:
        """Whether trainings are ended early."""
        return self.prune and len(self.objectives) == 1 and self.together == 1

    def spaces(self) -> dict[str, dict[str, Sequence[Any] | Range]]:
        """Word for a method -> option -> its values.

        Raises:
            ValueError: an unknown method, an option that it has not, or values that are none.
        """
        for name in self.methods:
            method_named(name)
        if unused := set(self.space) - set(self.methods):
            raise ValueError(f"space.{min(unused)} is of no method of this search: {', '.join(self.methods)}.")
        found: dict[str, dict[str, Sequence[Any] | Range]] = {}
        for name in self.methods:
            known = method_named(name)
            given = {option: _values(f"space.{name}.{option}", v) for option, v in self.space.get(name, {}).items()}
            for option in given:
                if option not in (*known.names(), RATE):
                    raise ValueError(f"space.{name}.{option} is no option of {known.name}.")
            fixed = [option for option in self.settings if option in known.names()]
            usual = {o: v for o, v in SPACES.get(known.name, {}).items() if o not in fixed}
            found[name] = {**usual, RATE: RATES, **given}
        return found

    def check(self) -> None:
        """Raises a ValueError for what does not fit, in the space or in the settings of a run."""
        self.spaces()
        for name in ("learning_rate", "gates_learning_rate"):
            if name in self.settings:
                raise ValueError(f"{name} has no meaning here: rates are searched, and space says between which.")
        if self.pruned and "early_stopping_patience" in self.settings:
            raise ValueError(
                "early_stopping_patience ends trainings as prune does, and the two could not be told apart: add "
                "--no-prune."
            )
        candidates_of(self.common, self.methods)

    def mixed(self) -> list[str]:
        """Every method, and every mix of as many as are allowed."""
        sizes = range(1, min(self.mixes, len(self.methods)) + 1)
        return ["+".join(mix) for size in sizes for mix in combinations(self.methods, size)]


COSTS = ("parameters", "memory", "latency")
"""Objectives beside the score; less is better."""


def _values(where: str, given: Any) -> Sequence[Any] | Range:
    if isinstance(given, list) and given:
        return given
    if isinstance(given, Mapping):
        try:
            return Range(**given)
        except ValidationError as error:
            raise ValueError(f"{where}: {error.errors()[0]['msg']}") from error
    raise ValueError(f"{where} is a list of values, or a range {{low: 1, high: 8}}; got {given!r}.")


def draw(trial: Draws, config: SearchConfig) -> dict[str, Any]:
    """A candidate: `adapters` and `composition` of a run. Rates are `rate`, in times of the default."""
    spaces, mixes = config.spaces(), config.mixed()
    mix = (trial.suggest_categorical("mix", mixes) if len(mixes) > 1 else mixes[0]).split("+")
    adapters: dict[str, dict[str, Any]] = {}
    for name in mix:
        chosen: dict[str, Any] = {o: _drawn(trial, f"{name}.{o}", v) for o, v in spaces[name].items()}
        fixed = {o: v for o, v in config.settings.items() if o in method_named(name).names() and o not in chosen}
        adapters[name.replace("-", "_")] = {"method": name, **fixed, **chosen}
    gated = config.gates and len(mix) > 1 and trial.suggest_categorical("gates", [False, True])
    names = [f"learned*{name}" for name in adapters] if gated else list(adapters)
    return {"adapters": adapters, "composition": " + ".join(names)}


def _drawn(trial: Draws, name: str, values: Sequence[Any] | Range) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, list(values)) if len(values) > 1 else values[0]
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def settings_of(drawn: Mapping[str, Any], common: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    """The settings of a run. `rates`: word for a method -> its default learning rate.

    Every start is drawn from a seed of its own, so that a candidate starts alike by itself and beside others.
    """
    adapters: dict[str, Any] = {}
    for number, (name, one) in enumerate(drawn["adapters"].items()):
        own = {option: value for option, value in one.items() if option != RATE}
        rate = rates[one["method"]] * one[RATE]
        seed = {} if "init_seed" in own else {"init_seed": int(common.get("seed", 42)) + number}
        adapters[name] = {**own, **seed, **default_options(one["method"], own), "learning_rate": rate}
    several = len(adapters) > 1 or "*" in drawn["composition"]
    return {**common, "adapters": adapters, **({"composition": drawn["composition"]} if several else {})}
