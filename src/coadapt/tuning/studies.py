"""The study that Optuna keeps of a search: where it is, what draws, what gives up, and what mattered."""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coadapt.evaluation.metrics import Metric
from coadapt.tuning.grounds import Kind
from coadapt.tuning.space import COSTS, Range, SearchConfig
from coadapt.tuning.trial import Result

SEARCH = Kind(name="search", verb="search", file="search.yaml", may_grow=("trials", "time", "storage"))


def open_study(config: SearchConfig, metric: Metric, fingerprint: str) -> Study:
    """The study in the storage, new or known.

    Raises:
        ValueError: the storage cannot be reached, or has a study of that name that is another search.
    """
    score = "maximize" if metric.higher_is_better else "minimize"
    directions: list[Any] = ["minimize" if name in COSTS else score for name in config.objectives]
    told = {**config.plain(), "data_sha256": fingerprint}
    for name in (*SEARCH.may_grow, "study"):
        told.pop(name, None)
    told["settings"] = {k: v for k, v in told["settings"].items() if k not in ("model", "data", "eval_data")}
    try:
        study = optuna.create_study(
            storage=_storage(config),
            study_name=config.study,
            directions=directions,
            sampler=_sampler(config, 0),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4) if config.pruned else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        before = study.user_attrs.get("search")
        study.sampler = _sampler(config, len(study.get_trials(deepcopy=False)))
    except Exception as error:  # of any storage that Optuna, or SQLAlchemy below it, knows
        raise ValueError(f"storage={config.storage!r} cannot be used: {error}") from error
    told = json.loads(json.dumps(told))
    if before is None:
        study.set_user_attr("search", told)
    elif before != told:
        other = [name for name in told if told[name] != before.get(name)]
        raise ValueError(
            f"study={config.study!r} in this storage is a search with other settings ({', '.join(other)}): give the "
            "same, or another name."
        )
    return study


def _storage(config: SearchConfig) -> Any:
    if config.storage is None:
        return f"sqlite:///{config.out.resolve() / 'study.db'}"
    if "://" in config.storage:
        return config.storage
    backend = JournalFileBackend(config.storage)
    return optuna.storages.JournalStorage(backend)


def _sampler(config: SearchConfig, done: int) -> optuna.samplers.BaseSampler:
    seed = int(config.settings.get("seed", 42)) + done  # machines that begin one after another do not draw alike
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(2, min(10, (config.most or 30) // 3))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True)


class Pruning(TrainerCallback):
    """Tells Optuna the validation loss of each evaluation, and ends a training that it gives up."""

    def __init__(self, trial: optuna.Trial, known: Mapping[int, float]) -> None:
        self.trial, self.known = trial, dict(known)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        step = state.global_step
        if not step:
            return
        if step not in self.known:
            self.trial.report(metrics["eval_loss"], step)
            self.known[step] = metrics["eval_loss"]
        if step < state.max_steps and self.trial.should_prune():
            control.should_training_stop = True


def score_of(result: Result) -> float:
    """The mean over the scored rows."""
    assert result.values
    assert result.weights
    total = sum(value * weight for value, weight in zip(result.values, result.weights, strict=True))
    return total / sum(result.weights)


def described(params: Mapping[str, Any]) -> str:
    """A candidate in a line: its mix, and each method's choices."""
    mix = str(params.get("mix", "")).split("+") if "mix" in params else sorted({k.partition(".")[0] for k in params})
    parts = []
    for name in mix:
        own = {k.partition(".")[2]: v for k, v in params.items() if k.startswith(f"{name}.")}
        told = ", ".join(
            f"{SHORT.get(k, k)} {v:.3g}" if isinstance(v, float) else f"{SHORT.get(k, k)} {v}" for k, v in own.items()
        )
        parts.append(f"{name} ({told})")
    return " + ".join(parts) + (", gated" if params.get("gates") else "")


SHORT = {"num_virtual_tokens": "length", "target_modules": "at", "rate": "rate x", "reduction_factor": "reduction"}
"""Options as they are told in a line."""


def importance(study: Study, config: SearchConfig) -> dict[str, float]:
    """Choice -> its share in how the score differs (PED-ANOVA, arXiv:2304.10255), by groups that sum to 1.

    The mix is weighed over all trials, each method's options over those that have the method. A group with fewer than 4
    trials has none: nothing could be told from it.
    """
    at = config.objectives.index(config.score)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    groups = [["mix"]] if len(config.mixed()) > 1 else []
    for name in config.methods:
        options = [o for o, v in config.spaces()[name].items() if isinstance(v, Range) or len(v) > 1]
        groups.append([f"{name}.{option}" for option in options])
    weighed: dict[str, float] = {}
    for group in groups:
        having = [t for t in complete if all(p in t.params for p in group)]
        if len(having) < 4 or len({t.values[at] for t in having}) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weighed |= optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                params=group,
                target=lambda t: t.values[at],
            )
    return weighed
