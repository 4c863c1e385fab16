"""A run from settings to folder: what it learns, what it writes, what it refuses, and that a break changes nothing."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM, TrainerCallback

import models
from byte_tokenizer import save_base
from coadapt import PeftModel
from coadapt.hub.card import make_card
from coadapt.training import run as module
from coadapt.training.ask import answer
from coadapt.training.folder import damage
from coadapt.training.load import load
from coadapt.training.log import named, read_log
from coadapt.training.run import Outcome, train
from coadapt.training.settings import RunConfig

SHORT: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "eval_split": 0.2,
    "logging_steps": 2,
    "use_cpu": True,
    "r": 4,
    "lora_dropout": 0.1,
}


def go(base: str, data: str, out: Path, console: Console | None = None, **settings: Any) -> Outcome:
    told = {name: value for name, value in {**SHORT, **settings}.items() if value is not None}
    run = RunConfig(model=base, data=data, output_dir=str(out), **told)
    return train(run, console or Console(file=io.StringIO(), width=120))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {f"{f.parent.name}/{k}": v for f in out.rglob("adapter_model.safetensors") for k, v in load_file(f).items()}


def test_a_run_learns_and_leaves_everything_in_its_folder(base: str, rows: str, out: Path) -> None:
    text = io.StringIO()
    done = go(base, rows, out, Console(file=text, width=120))
    log = read_log(out / "metrics.jsonl")
    held_out = [line["eval/loss"] for line in log if "eval/loss" in line]
    assert done.held_out_loss == held_out[-1] < 0.96 * held_out[0]
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2, 3, 4, 6]
    norms = {f"train/{figure}/default" for figure in ("grad_norm", "update_norm", "update_ratio", "learning_rate")}
    assert {"train/loss", "train/learning_rate", "train/peak_memory_gib", *norms} <= set(log[1])
    assert all(norms <= set(line) for line in log if "train/loss" in line)
    assert yaml.safe_load((out / "run.yaml").read_text())["adapters"]["default"]["r"] == 4
    told = json.loads((out / "provenance.json").read_text())
    assert told["versions"]["torch"] == torch.__version__
    assert len(told["data"]["sha256"]) == 64
    assert told["base"]["fingerprint"]
    assert "| held-out loss |" in make_card(out).text
    assert (out / "last").resolve() == out / "checkpoint-6"
    assert {"prompt + completion", "⟦", "trainable", "held-out loss"} <= set(_found(text.getvalue()))


def _found(text: str) -> list[str]:
    return [word for word in ("prompt + completion", "⟦", "trainable", "held-out loss") if word in text]


def test_a_tracker_gets_what_the_log_has(base: str, rows: str, out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(base, rows, out, method="lora + prompt", report_to="tensorboard")
    [events] = (out / "runs").iterdir()
    tracker = EventAccumulator(str(events)).Reload()
    log = [line for line in read_log(out / "metrics.jsonl") if "train/loss" in line]
    for figure in (
        "loss",
        "peak_memory_gib",
        "grad_norm/lora",
        "update_norm/prompt",
        "update_ratio/lora",
        "grad_norm.B/lora",
    ):
        found = {event.step: event.value for event in tracker.Scalars(f"train/{figure}")}
        assert found == pytest.approx({line["step"]: line[f"train/{figure}"] for line in log}, rel=1e-6), figure
    assert len(tracker.Scalars("eval/loss")) == 3


def test_a_tracker_that_is_not_there_is_refused_first(
    base: str, rows: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # as Python says itself that there is no such module
    with pytest.raises(ValueError, match=r'is not installed. Run: pip install "coadapt\[tensorboard\]"'):
        go(base, rows, out, report_to="tensorboard")
    with pytest.raises(ValueError, match=r"'tensorbord' is no tracker\. Did you mean 'tensorboard'"):
        go(base, rows, out, report_to="tensorbord")
    assert not out.exists()


def test_the_picture_shows_two_lines(base: str, rows: str, out: Path) -> None:
    go(base, rows, out)
    pixels = imread(out / "loss.png")[..., :3]
    for color in ((0x2B, 0x6C, 0xB0), (0xD9, 0x73, 0x0D)):
        near = abs(pixels - torch.tensor(color).numpy() / 255).max(-1) < 0.02
        assert near.sum() > 100, color


class BreakAt(TrainerCallback):
    """A person who presses Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def go_until(step: int, monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> Outcome:
    """A run that is interrupted in this step."""
    build = module._trainer

    def breaking(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        trainer.add_callback(BreakAt(step))
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(module, "_trainer", breaking)
        return go(*args, **settings)


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    both: dict[str, Any] = {"method": "prompt + lora", "num_virtual_tokens": 4, "logging_steps": 1}
    go(base, rows, whole, **both)
    first = go_until(step, monkeypatch, base, rows, broken, **both)
    assert (first.interrupted, first.step) == (True, step + 1)
    assert not (broken / "composition.json").exists()
    second = go(base, rows, broken, **both, resume=True)
    assert (second.interrupted, second.step) == (False, 6)
    one, other = weights(whole), weights(broken)
    assert len(one) > 4
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    figures = (
        "step",
        "train/loss",
        "eval/loss",
        "train/grad_norm.A/lora",
        "train/effective_rank/lora",
        "train/learning_rate/prompt",
        "warning",
    )
    figures += ("train/update_norm/lora", "train/update_ratio/prompt")
    logs = [
        [{k: line[k] for k in figures if k in line} for line in read_log(o / "metrics.jsonl")] for o in (whole, broken)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("composition", ["token_router(a, b)", "learned*a + learned_per_layer*b"])
def test_gates_train_at_their_own_rate_and_a_break_changes_nothing(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composition: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    how: dict[str, Any] = {
        "adapters": {"a": {"method": "lora", "r": 2}, "b": {"method": "lora", "r": 2}},
        "composition": composition,
        "gates_learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "r": None,
        "lora_dropout": None,
        "save_steps": 1,
    }
    go(base, rows, whole, **how)
    go_until(3, monkeypatch, base, rows, broken, **how)
    go(base, rows, broken, **how, resume=True)
    one, other = (load_file(folder / "composition.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [[line for line in read_log(o / "metrics.jsonl") if "train/loss" in line] for o in (whole, broken)]
    gates = [[{k: line[k] for k in line if k.startswith("train/gate/")} for line in log] for log in logs]
    assert gates[0] == gates[1]
    assert len({line["train/gate/a"] for line in logs[0]}) == len(logs[0])
    assert {line["train/learning_rate/gates"] for line in logs[0]} == {0.05}
    assert {line["train/learning_rate/a"] for line in logs[0]} == {0.01}


def test_a_rate_for_gates_that_are_not_there_is_refused(base: str, rows: str, out: Path) -> None:
    with pytest.raises(ValueError, match=r"gates_learning_rate=0\.05 has no effect"):
        go(base, rows, out, gates_learning_rate=0.05)


# After a few steps at this rate the held-out loss gets worse.
TOO_FAR: dict[str, Any] = {"learning_rate": 0.5, "num_train_epochs": 24, "eval_steps": 2, "early_stopping_patience": 3}
"""A rate at which the loss goes up and down, so that a best one is passed, wherever that is on this processor."""


def test_a_run_that_gets_no_better_stops_and_saves_the_best(base: str, rows: str, out: Path) -> None:
    text = io.StringIO()
    done = go(base, rows, out, Console(file=text, width=200), **TOO_FAR)
    losses = {line["step"]: line["eval/loss"] for line in read_log(out / "metrics.jsonl") if "eval/loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < done.step == best + 2 * 3 < 72
    assert (done.best_step, done.held_out_loss) == (best, losses[best])
    assert (out / "best").resolve().name == f"checkpoint-{best}"
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).state_dict()
    kept, last = (load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (best, done.step))
    tensors = [name for name in kept if name.endswith((".A", ".B"))]
    assert len(tensors) == 28
    assert all(torch.equal(saved[name], kept[name]) for name in tensors)
    assert not any(torch.equal(saved[name], last[name]) for name in tensors)
    assert f"Stopped early, at step {done.step} of 72" in text.getvalue()
    assert f"Saved are the best adapters, of step {best} (held-out loss {losses[best]:.4f})" in text.getvalue()
    assert f"the best adapters, of step {best}" in make_card(out).text
    with pytest.raises(ValueError, match=r"stopped at step .* Raise early_stopping_patience to go on"):
        go(base, rows, out, resume=True, **TOO_FAR)
    assert go(base, rows, out, resume=True, **{**TOO_FAR, "early_stopping_patience": 4}).step > done.step


def test_an_interrupted_run_stops_as_early_as_an_unbroken_one(
    base: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = go(base, rows, whole, **TOO_FAR)
    assert go_until(done.step - 2, monkeypatch, base, rows, broken, **TOO_FAR).interrupted
    again = go(base, rows, broken, resume=True, **TOO_FAR)
    assert (again.step, again.best_step, again.held_out_loss) == (done.step, done.best_step, done.held_out_loss)
    one, other = (load_file(out / "adapter_model.safetensors") for out in (whole, broken))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_stopping_early_needs_rows_that_are_held_out(base: str, rows: str, out: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is held out: eval_split=0 of 30 rows"):
        go(base, rows, out, eval_split=0, early_stopping_patience=1)
    assert not out.exists()


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(base: str, rows: str, tmp_path: Path) -> None:
    losses = [
        go(base, rows, tmp_path / str(i), seed=seed, max_steps=2).held_out_loss for i, seed in enumerate((1, 1, 2))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 1e-5),
        ({"auto_find_batch_size": True}, 0),
        ({"bf16": True}, 2e-2),
    ],
)
def test_ways_to_save_memory_change_no_result(
    base: str, rows: str, tmp_path: Path, settings: dict[str, Any], tolerance: float
) -> None:
    plain = go(base, rows, tmp_path / "plain", lora_dropout=0.0).held_out_loss
    assert go(base, rows, tmp_path / "saving", lora_dropout=0.0, **settings).held_out_loss == pytest.approx(
        plain, rel=tolerance
    )


def test_results_are_not_overwritten_unasked_and_only_ours_are_replaced(base: str, rows: str, out: Path) -> None:
    go(base, rows, out, max_steps=1, method="prompt + lora")
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"holds the results of a run already.*--overwrite-output-dir"):
        go(base, rows, out, max_steps=1)
    with pytest.raises(ValueError, match="no column 'typo'"):
        go(base, rows, out, overwrite_output_dir=True, text_column="typo")
    assert (out / "composition.json").exists()
    go(base, rows, out, max_steps=1, overwrite_output_dir=True)
    there = {p.name for p in out.iterdir()}
    assert {"mine.txt", "adapter_config.json"} <= there
    assert not {"prompt", "lora"} & there


def test_an_adapter_that_stands_still_is_told_of_on_the_screen_and_in_the_log(base: str, rows: str, out: Path) -> None:
    text = io.StringIO()
    adapters = {"moves": {"method": "lora"}, "stays": {"method": "prompt", "learning_rate": 1e-14}}
    settings = {"max_steps": 4, "logging_steps": 1, "use_cpu": True, "warmup_steps": 0}
    run = RunConfig(model=base, data=rows, output_dir=str(out), adapters=adapters, **settings)
    train(run, Console(file=text, width=100))
    [told] = [line for line in read_log(out / "metrics.jsonl") if "warning" in line]
    assert told["step"] == 3
    assert "'stays' stands still" in told["warning"]
    assert text.getvalue().count(f"warning: {told['warning']}") == 1


def test_a_resume_with_other_settings_is_refused(base: str, rows: str, out: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        go(base, rows, out, resume=True)
    go(base, rows, out, max_steps=1)
    with pytest.raises(ValueError, match=r"other settings.*\n.*seed: 42 then, 43 now"):
        go(base, rows, out, max_steps=2, resume=True, seed=43)
    assert go(base, rows, out, max_steps=2, resume=True).step == 2


SAVING: dict[str, Any] = {"save_steps": 2, "max_steps": 6, "logging_steps": 1, "eval_strategy": "no"}
PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def test_a_checkpoint_that_is_not_whole_is_left_out_with_a_word(base: str, rows: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(base, rows, whole, **SAVING)
    shutil.copytree(whole, broken, symlinks=True)
    for part in PARTS:
        file = broken / "checkpoint-6" / part
        content = file.read_bytes()
        assert damage(file.parent) is None
        for less in (content[: len(content) // 2], b""):
            file.write_bytes(less)
            assert damage(file.parent) == f"{part} was cut off"
        file.unlink()
        assert damage(file.parent) == f"{part} is missing"
        file.write_bytes(content)
    (broken / "checkpoint-6" / "trainer_state.json").unlink()
    (broken / "checkpoint-mine").mkdir()
    text = io.StringIO()
    go(base, rows, broken, Console(file=text, width=120), **SAVING, resume=True)
    assert "checkpoint-6 is left out, it was not written to its end: trainer_state.json is missing." in text.getvalue()
    assert "Going on from checkpoint-4." in text.getvalue()
    one, other = (load_file(out / "adapter_model.safetensors") for out in (whole, broken))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert damage(broken / "checkpoint-6") is None
    assert (broken / "checkpoint-mine").is_dir()


@pytest.mark.parametrize("how", [SAVING | {"max_steps": 5, "save_strategy": "steps"}, TOO_FAR], ids=["end", "early"])
def test_a_run_that_was_killed_after_its_last_step_is_brought_to_its_end(
    base: str, rows: str, out: Path, how: dict[str, Any]
) -> None:
    done = go(base, rows, out, **how)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for name in ("adapter_config.json", "adapter_model.safetensors", "composition.json", "loss.png"):
        (out / name).unlink()
    text = io.StringIO()
    again = go(base, rows, out, Console(file=text, width=120), resume=True, **how)
    assert f"Going on from checkpoint-{done.step}. Training had ended there" in text.getvalue()
    assert (again.step, again.best_step, again.held_out_loss) == (done.step, done.best_step, done.held_out_loss)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_what_a_resume_needs_is_looked_at_before_anything_is_done(base: str, rows: str, out: Path) -> None:
    go(base, rows, out, **SAVING)

    def refused(match: str, **settings: Any) -> None:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=match):
            go(base, rows, out, resume=True, **{**SAVING, **settings})
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    log, run = out / "metrics.jsonl", out / "run.yaml"
    lines, settings = log.read_text(), run.read_text()
    log.write_text(lines.replace('{"step": 2', '{"ste', 1))
    refused(r"metrics\.jsonl, line 3 is damaged: '\{\"ste.*Mend that line, or take it out")
    log.write_text(lines[:-20])  # where a process was killed
    assert len(read_log(log)) == len(lines.splitlines()) - 1
    log.write_text(lines)
    run.write_text(settings[: settings.index("max_grad_norm") + 6])
    refused(r"run\.yaml is damaged")
    run.write_text(settings[: settings.index("max_grad_norm")])
    refused(r"run\.yaml is incomplete: it does not say max_grad_norm, .*--overwrite-output-dir")
    run.write_text(settings.replace("image_column: null\n", ""))  # of a version that had no such setting
    go(base, rows, out, resume=True, **SAVING)
    run.unlink()
    refused(r"holds checkpoints, and no run\.yaml .*--overwrite-output-dir")
    run.write_text(settings)
    for number in (2, 4):
        shutil.rmtree(out / f"checkpoint-{number}")
    (out / "checkpoint-6" / "optimizer.pt").unlink()
    refused(r"holds what a run came to, and no checkpoint to go on from \(checkpoint-6: optimizer\.pt is missing\)")
    shutil.copytree(out / "checkpoint-6", out / "checkpoint-8")
    refused(r"no checkpoint in .* is whole \(checkpoint-8: .*; checkpoint-6: .*\)")


def test_a_loss_that_is_no_number_stops_the_run(
    base: str, rows: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base = module.load_base

    def broken(*args: Any, **options: Any) -> Any:
        model = load_base(*args, **options)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(module, "load_base", broken)
    with pytest.raises(ValueError, match=r"not finite at step 1, whose update was not made\. .* the loss is likely no"):
        go(base, rows, out, eval_strategy="no", eval_on_start=False, verify=False)


def test_a_composition_that_leaves_an_adapter_out_is_refused(base: str, rows: str, out: Path) -> None:
    with pytest.raises(ValueError, match="leaves out prompt"):
        go(base, rows, out, method="prompt + lora", composition="lora")


def test_a_composition_is_trained_saved_and_asked_again(base: str, rows: str, out: Path) -> None:
    adapters = {"task": {"method": "prompt", "num_virtual_tokens": 3}, "style": {"method": "lora"}}
    plain = {k: v for k, v in SHORT.items() if k not in ("r", "lora_dropout")}
    run = RunConfig(
        model=base, data=rows, output_dir=str(out), adapters=adapters, composition="task + 0.5*style", **plain
    )
    done = train(run, Console(file=io.StringIO()))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    tokens = torch.tensor([[1, 40, 41, 42]])
    done.view.eval()
    assert torch.equal(again(tokens).logits, done.view(tokens).logits)
    assert repr(again.composition) == "task + 0.5*style"
    ready = load(None, out)
    asked = answer(ready, "1+1=", max_new_tokens=4)
    assert asked == answer(ready, "1+1=\n", max_new_tokens=4, raw=True)


# The base's own head is new, hence random, each time it is loaded; the adapter has the trained one.
@pytest.mark.filterwarnings("ignore:.*was trained on a base with other weights")
def test_classes_of_a_table(tmp_path: Path, out: Path) -> None:
    base = save_base(tmp_path / "base")
    lines = "".join(f"{word}{i},{label}\n" for i in range(20) for word, label in (("aaa", "first"), ("zzz", "second")))
    (tmp_path / "rows.csv").write_text("text,label\n" + lines)
    done = go(str(base), str(tmp_path / "rows.csv"), out, num_train_epochs=6)
    accuracies = [line["eval/accuracy"] for line in read_log(out / "metrics.jsonl") if "eval/accuracy" in line]
    assert accuracies[-1] == 1.0
    ready = load(None, out)
    assert [answer(ready, text) for text in ("aaa7", "zzz7")] == ["first", "second"]
    assert "score" in str(done.view.get_adapter("default"))


def masked_bert(**options: Any) -> BertForMaskedLM:
    return BertForMaskedLM(models.bert(**options).config)


@pytest.mark.filterwarnings("ignore:.*was trained on a base with other weights")
def test_tags_of_words(tmp_path: Path, out: Path) -> None:
    base = save_base(tmp_path / "base", masked_bert)
    rows = [{"words": [f"aa{i}", "zz", f"a{i}"], "tags": ["first", "second", "first"]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = go(str(base), str(tmp_path / "rows.jsonl"), out, num_train_epochs=6)
    told = yaml.safe_load((out / "run.yaml").read_text())
    assert told["task"] == "token-classification"
    accuracies = [line["eval/accuracy"] for line in read_log(out / "metrics.jsonl") if "eval/accuracy" in line]
    assert accuracies[-1] == 1.0
    assert answer(load(None, out), "zz a7  zz") == "zz/second a7/first zz/second"
    assert "classifier" in str(done.view.get_adapter("default"))


def test_sources_and_targets(tmp_path: Path, out: Path) -> None:
    base = save_base(tmp_path / "base", models.t5)
    (tmp_path / "rows.jsonl").write_text('{"source": "ab", "target": "yes"}\n' * 20)
    done = go(str(base), str(tmp_path / "rows.jsonl"), out, num_train_epochs=12, learning_rate=5e-2)
    losses = [line["eval/loss"] for line in read_log(out / "metrics.jsonl") if "eval/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert done.step == 24


def test_figures_have_the_names_that_trackers_use() -> None:
    logs = {"loss": 1, "grad_norm": 2, "learning_rate/a": 3, "train_runtime": 4, "eval_loss": 5, "epoch": 6, "step": 7}
    assert list(named(logs)) == [
        "train/loss",
        "train/grad_norm",
        "train/learning_rate/a",
        "train/runtime",
        "eval/loss",
        "epoch",
        "step",
    ]


def test_a_run_in_which_an_adapter_would_not_train_does_not_begin(base: str, rows: str, out: Path) -> None:
    said = {"model": base, "data": rows, "max_steps": 2, "output_dir": str(out)}
    adapters = {"a": {"method": "lora"}, "b": {"method": "lora"}}
    console = Console(file=io.StringIO(), width=120)
    with pytest.raises(ValueError, match=r"training would be in vain.*\nFAIL +b +changes the output"):
        train(RunConfig(**said, adapters=adapters, composition="a + 0*b"), console)
    assert not list(out.glob("checkpoint-*"))
    train(RunConfig(**said, adapters=adapters, composition="a + 0*b", verify=False), console)
    train(RunConfig(**said, adapters=adapters, overwrite_output_dir=True), console)
    assert "every adapter changes the output" in console.file.getvalue()  # type: ignore[attr-defined]


def test_tokens_that_the_model_does_not_know_are_refused(base: str, rows: str, out: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    small = tmp_path / "small"
    model.save_pretrained(small)
    tokenizer.add_tokens(["<plus>"])
    tokenizer.save_pretrained(small)
    data = tmp_path / "plus.jsonl"
    data.write_text(Path(rows).read_text("utf-8").replace("+", "<plus>"), "utf-8")
    if len(tokenizer) <= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer) - 1)
        model.save_pretrained(small)
    with pytest.raises(ValueError, match=r"no embeddings for, '<plus>' among them.*resize_token_embeddings"):
        go(str(small), str(data), out, max_steps=1)
    go(str(small), rows, out, max_steps=1)
