"""One run over several data sets: each adapter comes out as from its solo run; they start and stop by themselves."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from byte_tokenizer import save_base
from coadapt import PeftModel
from coadapt.cli.group import run as run_command
from coadapt.data.collate import Collator
from coadapt.data.columns import Told
from coadapt.data.prepare import plan, prepare
from coadapt.data.source import read
from coadapt.hub.card import make_card
from coadapt.training.assemble import adapter_config
from coadapt.training.folder import damage
from coadapt.training.log import held_out_losses, read_log
from coadapt.training.picture import _apart, draw
from coadapt.training.run import Outcome, train
from coadapt.training.settings import AdapterSettings, RunConfig
from coadapt.training.trainer import own_seed

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "logging_steps": 10,
    "eval_split": 0.2,
    "eval_strategy": "no",
    "save_strategy": "no",
    "verify": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4, "learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.1},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3, "learning_rate": 2e-2, "max_grad_norm": 0.1},
    "prefix": {"method": "prefix", "num_virtual_tokens": 2, "learning_rate": 2e-2},
    "bottleneck": {"method": "bottleneck", "learning_rate": 5e-3},
    "ia3": {"method": "ia3", "learning_rate": 2e-2},
}
Sets = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two files of unequal length, with columns of other names and rows of other lengths: 24 and 14 are trained on."""
    folder = tmp_path_factory.mktemp("joint")
    add = [{"prompt": f"{a}+{b}=", "completion": f" {a + b}"} for a in range(6) for b in range(5)]
    say = [{"question": f"say {'ab'[n % 2] * (n + 1)}", "reply": f"{'no yes'.split()[n % 2]} {n}"} for n in range(17)]
    for name, rows in (("add", add), ("say", say)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in ("add", "say")}


def sets(files: dict[str, str], left: str = "left", right: str = "right") -> Sets:
    """`add` for one composition, `say` for another."""
    say = {"prompt_column": "question", "completion_column": "reply"}
    return {
        "add": {"data": files["add"], "composition": left},
        "say": {"data": files["say"], "composition": right, **say},
    }


def go(base: str, out: Path, console: Console | None = None, **settings: Any) -> Outcome:
    run = RunConfig(model=base, output_dir=str(out), **{**COMMON, **settings})
    return train(run, console or Console(file=io.StringIO(), width=160))


def weights(out: Path, adapter: str) -> dict[str, torch.Tensor]:
    """What a folder has of an adapter; one that is alone may lie in the folder itself."""
    place = out / adapter if (out / adapter).is_dir() else out
    return load_file(place / "adapter_model.safetensors")


def off(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of a tensor from the other, relative to its norm."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm().clamp(min=1e-12)) for k in one)


def column(out: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_log(out / "metrics.jsonl") if key in line}


# ---- isolation -------------------------------------------------------------------------------------------------------


def isolated(base: str, both: Sets, adapters: dict[str, Any], tmp_path: Path, **how: Any) -> None:
    """The joint run against the solo runs: weights and both losses."""
    both["add"]["weight"], both["say"]["weight"] = 5, 3
    go(base, tmp_path / "joint", datasets=both, adapters=adapters, per_device_train_batch_size=8, **how)
    for name, adapter, rows in (("add", "left", 5), ("say", "right", 3)):
        alone = {k: v for k, v in both[name].items() if k != "weight"}
        one = {"datasets": {name: alone}, "adapters": {adapter: adapters[adapter]}}
        go(base, tmp_path / name, **one, per_device_train_batch_size=rows, **how)
        assert off(weights(tmp_path / "joint", adapter), weights(tmp_path / name, adapter)) < 2e-5
        for key, own in ((f"eval/{name}/loss", "eval/loss"), (f"train/loss/{name}", "train/loss")):
            solo = column(tmp_path / name, own)
            assert column(tmp_path / "joint", key) == pytest.approx(solo, rel=1e-5)
            assert solo


PAIRS = [
    pytest.param(left, right, marks=[] if (left, right) == ("lora", "prefix") else [pytest.mark.full])
    for left in ("lora", "prompt")
    for right in ("lora", "prompt", "prefix", "bottleneck", "ia3")
]


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_each_adapter_is_what_its_solo_run_gives(
    base: str, files: dict[str, str], tmp_path: Path, left: str, right: str
) -> None:
    adapters = {"left": KINDS[left], "right": KINDS[right]}
    isolated(base, sets(files), adapters, tmp_path, max_steps=50, eval_strategy="steps", eval_steps=25)


@pytest.mark.full
@pytest.mark.parametrize("how", [{"gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}])
def test_isolation_holds_under_accumulation_and_checkpointing(
    base: str, files: dict[str, str], tmp_path: Path, how: dict[str, Any]
) -> None:
    adapters = {"left": KINDS["lora"], "right": KINDS["prompt"]}
    isolated(base, sets(files), adapters, tmp_path, max_steps=50, eval_strategy="steps", eval_steps=25, **how)


@pytest.mark.full
def test_isolation_of_an_encoder_decoder(files: dict[str, str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", models.t5)
    adapters = {"left": KINDS["lora"], "right": KINDS["bottleneck"]}
    isolated(str(base), sets(files), adapters, tmp_path, max_steps=50, eval_strategy="steps", eval_steps=25)


def labelled(tmp_path: Path, labels: tuple[str, str], name: str, rows: int) -> str:
    file = tmp_path / f"{name}.csv"
    lines = "".join(f"{name}{word}{i},{label}\n" for i in range(rows) for word, label in zip("az", labels, strict=True))
    file.write_text("text,label\n" + lines)
    return str(file)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*was trained on a base with other weights")
def test_isolation_of_classifiers_whose_heads_are_of_one_shape(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    both = {
        name: {"data": labelled(tmp_path, ("no", "yes"), name, rows), "composition": adapter}
        for name, adapter, rows in (("add", "left", 20), ("say", "right", 13))
    }
    adapters = {"left": KINDS["lora"], "right": KINDS["prefix"]}
    isolated(str(base), both, adapters, tmp_path, max_steps=50, eval_strategy="steps", eval_steps=25)
    assert set(column(tmp_path / "joint", "eval/say/accuracy")) == {0, 25, 50}


def test_what_cannot_go_through_one_forward_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapters = {"left": KINDS["lora"], "right": KINDS["lora"]}
    one = {"data": labelled(tmp_path, ("no", "yes"), "one", 4), "composition": "left"}
    two = {"data": labelled(tmp_path, ("bad", "good"), "two", 4), "composition": "right"}
    with pytest.raises(ValueError, match=r"'one' is for sequence-classification, 'say' for causal-lm, and one run has"):
        go(str(base), tmp_path / "out", datasets={"one": one, "say": sets(files)["say"]}, adapters=adapters)
    with pytest.raises(ValueError, match=r"'one' has the classes no, yes, 'two' bad, good\. Train them in two runs"):
        go(str(base), tmp_path / "out", datasets={"one": one, "two": two}, adapters=adapters)
    assert not (tmp_path / "out").exists()


# ---- starting late, stopping early -----------------------------------------------------------------------------------


def staged(files: dict[str, str], **second: Any) -> dict[str, Any]:
    """`left` until step 6 on one data set; then `right` on top of it, frozen, on the other."""
    adapters = {
        "left": {**KINDS["lora"], "stop_step": 6},
        "right": {**KINDS["lora"], "start_step": 6, "stop_step": 14, **second},
    }
    both = sets(files, right="left >> right")
    return {"datasets": both, "adapters": adapters, "per_device_train_batch_size": 6, "logging_steps": 1}


def by_hand(base: str, file: str, first: Path, begin: Callable[[Any], None], steps: int = 8) -> dict[str, torch.Tensor]:
    """The second stage as a loop over batches of two rows, on the first stage's adapter, loaded and frozen."""
    view = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, adapter_name="left")
    settings = AdapterSettings(**KINDS["lora"])
    view.add_adapter("right", adapter_config("right", settings, "causal-lm", seed=own_seed(42, "right")))
    begin(view)
    view.set_adapter("left >> right")
    found = plan(read(file), None, Told(prompt="question", completion="reply"), "causal-lm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = prepare(found, tokenizer, task="causal-lm", max_length=128, eval_split=0.2, seed=42).train
    own = list(view.get_adapter("right").parameters())
    optimizer = torch.optim.AdamW(own, weight_decay=0.1)
    for step in range(steps):
        passed, at = divmod(step, 7)  # 14 rows are 7 batches
        order = torch.randperm(14, generator=torch.Generator().manual_seed(42 + passed)).tolist()
        batch = Collator(pad_token_id=0)([rows[i] for i in order[2 * at : 2 * at + 2]])
        optimizer.param_groups[0]["lr"] = 1e-2 * (step / 5 if step < 5 else (steps - step) / (steps - 5))
        view(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return view.get_adapter("right").state_dict()


def same_start(view: Any) -> None:
    view.get_adapter("right").load_state_dict(view.get_adapter("left").state_dict())


@pytest.mark.parametrize(
    ("second", "begin"),
    [({}, lambda view: None), pytest.param({"init_from": "left"}, same_start, marks=pytest.mark.full)],
    ids=["new", "init_from"],
)
def test_the_second_stage_trains_on_top_of_the_frozen_first(
    base: str, files: dict[str, str], tmp_path: Path, second: dict[str, Any], begin: Any
) -> None:
    how = staged(files, **second)
    done = go(base, tmp_path / "staged", **how)
    assert done.step == 14
    log = read_log(tmp_path / "staged" / "metrics.jsonl")
    trained = {n: [line["step"] for line in log if f"train/update_norm/{n}" in line] for n in ("left", "right")}
    assert trained == {"left": list(range(1, 7)), "right": list(range(7, 15))}
    assert list(column(tmp_path / "staged", "train/loss/say")) == trained["right"]
    first = {"datasets": {"add": how["datasets"]["add"]}, "adapters": {"left": KINDS["lora"]}, "max_steps": 6}
    go(base, tmp_path / "first", **first, per_device_train_batch_size=4)  # 24 and 14 rows, 6 in a batch: 4 and 2
    assert off(weights(tmp_path / "staged", "left"), weights(tmp_path / "first", "left")) < 1e-5
    expected = by_hand(base, files["say"], tmp_path / "first", begin)
    assert off(done.view.get_adapter("right").state_dict(), expected) < 1e-5


OFTEN: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "lr_scheduler_type": "constant"}


def stopping(files: dict[str, str]) -> dict[str, Any]:
    """`right` learns too fast, and stops soon; `left` goes on to the end."""
    left = {"method": "lora", "r": 4, "learning_rate": 1e-3, "early_stopping_patience": 3}
    right = {"method": "lora", "r": 4, "learning_rate": 0.02, "early_stopping_patience": 2}
    return {"datasets": sets(files), "adapters": {"left": left, "right": right}, "max_steps": 18, **OFTEN}


def test_an_adapter_stops_at_its_best_while_the_other_goes_on(base: str, files: dict[str, str], tmp_path: Path) -> None:
    how, text = stopping(files), io.StringIO()
    done = go(base, tmp_path / "joint", Console(file=text, width=200), **how)
    assert done.step == 18
    found = column(tmp_path / "joint", "eval/say/loss")
    del found[0]
    stopped = max(column(tmp_path / "joint", "train/update_norm/right"))
    best = min(range(2, stopped + 1, 2), key=lambda step: found[step])
    assert best == stopped - 4 < 14
    after = {step: loss for step, loss in found.items() if step > stopped}
    assert after == pytest.approx(dict.fromkeys(range(stopped + 2, 19, 2), found[best]))
    assert max(column(tmp_path / "joint", "train/update_norm/left")) == 18
    assert f"right: stopped early, at step {stopped}; saved as it was at step {best}, its best" in text.getvalue()
    # The same alone, stopped by transformers' own: `data` in place of `datasets`. 3 of 8 rows were of this one.
    alone = {k: v for k, v in how["datasets"]["say"].items() if k != "composition"}
    right = {k: v for k, v in how["adapters"]["right"].items() if k != "early_stopping_patience"}
    right["init_seed"] = own_seed(42, "right")
    more: dict[str, Any] = {"per_device_train_batch_size": 3, "early_stopping_patience": 2, "save_strategy": "steps"}
    solo = go(base, tmp_path / "solo", **alone, adapters={"right": right}, **OFTEN, **more, save_steps=2, max_steps=18)
    assert (solo.best_step, solo.step) == (best, stopped)
    assert off(weights(tmp_path / "joint", "right"), weights(tmp_path / "solo", "right")) < 1e-4


def test_a_run_ends_when_all_have_stopped(base: str, files: dict[str, str], tmp_path: Path) -> None:
    how = stopping(files)
    how |= {"early_stopping_threshold": 10, "save_strategy": "epoch"}  # no loss is better by so much
    done = go(base, tmp_path / "out", **how)
    assert done.step == 8  # of the evaluations at 2, 4, 6 and 8, `right` waits for two, `left` for three
    assert max(column(tmp_path / "out", "train/update_norm/right")) == 6
    assert damage(tmp_path / "out" / f"checkpoint-{done.step}") is None
    state = json.loads((tmp_path / "out" / f"checkpoint-{done.step}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Course"]["attributes"]["ended"] is True
    saved = {name: weights(tmp_path / "out", name) for name in ("left", "right")}
    (tmp_path / "out" / "composition.json").unlink()  # as if it was killed before the results were whole
    again = go(base, tmp_path / "out", **how, resume=True)
    assert again.step == done.step
    assert all(off(weights(tmp_path / "out", name), saved[name]) == 0 for name in saved)


def test_a_stage_waits_for_its_step_where_the_one_before_stopped_early(
    base: str, files: dict[str, str], tmp_path: Path
) -> None:
    how = staged(files)
    how["adapters"]["left"]["early_stopping_patience"] = 1
    how |= {"early_stopping_threshold": 10, "eval_strategy": "steps", "eval_steps": 1}
    done = go(base, tmp_path / "out", **how)
    assert list(column(tmp_path / "out", "train/loss")) == [1, 2, *range(7, 15)]  # the second evaluation is no better
    assert done.step == 14


@pytest.mark.full
def test_adapters_of_one_data_set_stop_at_steps_of_their_own(base: str, files: dict[str, str], tmp_path: Path) -> None:
    adapters = {"left": {**KINDS["lora"], "stop_step": 3}, "right": {**KINDS["prompt"], "early_stopping_patience": 1}}
    how = {**COMMON, **OFTEN, "logging_steps": 1, "early_stopping_threshold": 10}
    done = go(base, tmp_path / "out", data=files["add"], adapters=adapters, **{**how, "num_train_epochs": 4})
    assert done.step == 4
    trained = {name: list(column(tmp_path / "out", f"train/update_norm/{name}")) for name in adapters}
    assert trained == {"left": [1, 2, 3], "right": [1, 2, 3, 4]}


# ---- resuming, settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [6, pytest.param(12, marks=pytest.mark.full)])
def test_a_run_that_was_cut_off_comes_to_the_same_numbers(
    base: str, files: dict[str, str], tmp_path: Path, step: int
) -> None:
    """With dropout, accumulation, an adapter that stops early, and another that starts late from the first."""
    how = stopping(files)
    how["adapters"]["left"] |= {"lora_dropout": 0.2}
    how["adapters"]["last"] = {"method": "lora", "r": 4, "start_step": 10, "init_from": "right"}
    how["datasets"]["more"] = {**how["datasets"]["say"], "composition": "right >> last"}
    how |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 14}
    whole, out = tmp_path / "whole", tmp_path / "out"
    go(base, whole, **how)
    shutil.copytree(whole, out, symlinks=True)
    for later in [path for path in out.glob("checkpoint-*") if int(path.name.split("-")[1]) > step]:
        shutil.rmtree(later)
    assert go(base, out, **how, resume=True).step == 14
    for name in ("left", "right", "last"):
        assert off(weights(out, name), weights(whole, name)) == 0
    assert figures(out) == figures(whole)
    assert max(column(out, "train/update_norm/right")) < 10 == min(column(out, "train/loss/more")) - 2


def figures(out: Path) -> list[dict[str, Any]]:
    """The log without what depends on the machine."""
    speed = ("memory", "per_second", "runtime")
    lines = read_log(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not any(word in k for word in speed)} for line in lines]


def test_the_settings_that_are_written_build_the_same_run(base: str, files: dict[str, str], tmp_path: Path) -> None:
    how = staged(files, init_from="left", early_stopping_patience=2)
    how |= {"eval_strategy": "steps", "eval_steps": 5}
    listed = [{"name": name, **settings} for name, settings in how["datasets"].items()]
    run = RunConfig(model=base, output_dir="o", **{**COMMON, **how, "datasets": listed})
    assert run == RunConfig(model=base, output_dir="o", **{**COMMON, **how})
    assert RunConfig(**run.plain()) == run
    go(base, tmp_path / "out", **how)
    told = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    go(base, tmp_path / "again", **{k: v for k, v in told.items() if k not in ("model", "output_dir")})
    for name in ("left", "right"):
        assert off(weights(tmp_path / "again", name), weights(tmp_path / "out", name)) == 0


# ---- what is shown and proved ----------------------------------------------------------------------------------------


def test_each_data_set_is_proved_and_shown(base: str, files: dict[str, str], tmp_path: Path) -> None:
    text = io.StringIO()
    how: dict[str, Any] = {
        "adapters": {"left": KINDS["lora"], "right": KINDS["prompt"]},
        "max_steps": 2,
        "verify": True,
    }
    how |= {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    done = go(base, tmp_path / "out", Console(file=text, width=160), datasets=sets(files), **how)
    told = text.getvalue()
    assert "one step was tried: every adapter changes the output, gets a gradient and moves" in told
    losses = {name: list(column(tmp_path / "out", f"eval/{name}/loss").values()) for name in ("add", "say")}
    assert f"add {losses['add'][-1]:.4f}, say {losses['say'][-1]:.4f}" in told
    assert done.held_out_loss == pytest.approx((losses["add"][-1] + losses["say"][-1]) / 2)
    assert "5 of the 8 rows of a batch, a pass in 5 steps" in told
    card = make_card(tmp_path / "out").text
    assert f"| held-out loss of say | {losses['say'][0]:.4f} → {losses['say'][-1]:.4f} |" in card
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())["data"]["datasets"]
    assert facts["say"]["name"] == files["say"]
    assert run_command(["verify", "--adapter", str(tmp_path / "out"), "--adapters", "right"]) == 0
    assert run_command(["verify", "--adapter", str(tmp_path / "out")]) == 0
    gone = {**sets(files, right="right + 0*left"), "add": {**sets(files)["add"], "composition": "right"}}
    with pytest.raises(ValueError, match=r"training would be in vain.*\nFAIL +left +changes the output"):
        go(base, tmp_path / "gone", datasets=gone, **how)
    assert not list((tmp_path / "gone").iterdir())


def test_the_picture_has_a_line_for_each_data_set(tmp_path: Path) -> None:
    log = [{"step": s, "train/loss": 3.0 - s, "eval/loss": 2.5, "eval/a_b/loss": 2.0, "eval/c/loss": 3} for s in (1, 2)]
    assert _apart(log) == {"a_b": [(1, 2.0), (2, 2.0)], "c": [(1, 3), (2, 3)]}
    assert held_out_losses({"eval_loss": 1.0, "eval_a_b/loss": 2.0, "eval_c/accuracy": 0.5}) == {"a_b": 2.0}
    draw(log, tmp_path / "with.png", "title")
    draw([{k: v for k, v in line.items() if k.count("/") < 2} for line in log], tmp_path / "without.png", "title")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
