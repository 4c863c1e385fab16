"""Knowledge of restaurants, the style of plays: two adapters, trained side by side or one on the other, and joined."""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from coadapt import PeftModel
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from data import QUESTIONS, Restaurant, commonest, on_stage, restaurants, write

MIXES = ("knowledge + style", "knowledge + 0.5*style", "0.5*knowledge + 0.5*style", "later", "knowledge >> later")
MORE = ("ties", "knowledge2", "style2", "knowledge2 + style2")  # one adapter out of two; the run together.yaml
COMPOSITIONS = {"base": None, **{text: text for text in ("knowledge", "style", *MIXES, *MORE)}}
"""What is compared -> what a row of a batch asks for."""
LOSSES = {"facts": "loss, facts", "plays": "loss, plays", "stage": "loss, facts on stage"}
ASKED = {"facts known": QUESTIONS[0], "facts known, on stage": on_stage(QUESTIONS[0])}
COLUMNS = (*LOSSES.values(), *ASKED)
TOLD = (QUESTIONS[0].format("Giraffe"), on_stage(QUESTIONS[0].format("Giraffe")), on_stage("What says my lord?"))
Scores = dict[tuple[str, str], float]  # (what is compared, column)


def trained(name: str, model: Path, out: Path, seed: int, shorter: int) -> Path:
    """The folder of a run of NAME.yaml, with every number of steps divided by `shorter`."""
    settings = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text("utf-8"))
    for group in (settings, *settings["adapters"].values()):
        group |= {key: value // shorter for key, value in group.items() if key.endswith(("_step", "_steps"))}
    for data in settings["datasets"].values():
        data |= {key: str(out / Path(data[key]).name) for key in ("data", "eval_data")}
    settings |= {"model": str(model), "seed": seed, "output_dir": str(out / f"{name}-{seed}"), "use_cpu": True}
    return train(RunConfig(**settings, overwrite_output_dir=True), Console(quiet=True)).folder


def joined(model: Path, joint: Path, staged: Path, together: Path) -> PeftModel:
    """A view with the adapters of all runs (`knowledge` is the same in two), and with one made of two."""
    view = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), joint)
    for folder in (staged / "later", together / "knowledge2", together / "style2"):
        view.load_adapter(folder, folder.name)
    view.combine("knowledge + style", "ties", adapter_name="ties", density=0.5, r="full")
    return view.eval()


@torch.no_grad()
def losses(view: PeftModel, tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Mean loss, in nats, of the tokens of the rows' completions. A batch has each row once for each composition."""
    total, count = torch.zeros(len(COMPOSITIONS)), 0
    for row in rows:
        asked = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        logits = view(ids.expand(len(COMPOSITIONS), -1), adapter_names=list(COMPOSITIONS.values())).logits
        wanted = ids[:, len(asked) :].expand(len(COMPOSITIONS), -1)
        each = cross_entropy(logits[:, len(asked) - 1 : -1].transpose(1, 2), wanted, reduction="none")
        total, count = total + each.sum(1), count + wanted.shape[1]
    return dict(zip(COMPOSITIONS, (total / count).tolist(), strict=True))


@torch.no_grad()
def answers(view: PeftModel, tokenizer: Any, prompt: str) -> dict[str, str]:
    """What each composition says, the likeliest token each time; all in one batch."""
    asked = tokenizer([prompt] * len(COMPOSITIONS), return_tensors="pt", return_token_type_ids=False)
    said = view.generate(**asked, do_sample=False, adapter_names=list(COMPOSITIONS.values()))
    length = asked["input_ids"].shape[1]
    return dict(zip(COMPOSITIONS, tokenizer.batch_decode(said[:, length:], skip_special_tokens=True), strict=True))


def measured(view: PeftModel, tokenizer: Any, known: Sequence[Restaurant], out: Path) -> Scores:
    """Every composition in every column."""
    scores: Scores = {}
    for name, column in LOSSES.items():
        lines = (out / f"{name}-held-out.jsonl").read_text("utf-8").splitlines()
        found = losses(view, tokenizer, [json.loads(line) for line in lines])
        scores |= {(composition, column): loss for composition, loss in found.items()}
    for column, question in ASKED.items():
        said = [(one, answers(view, tokenizer, question.format(one.name))) for one in known]
        for name in COMPOSITIONS:
            scores[name, column] = 100 * statistics.fmean(one.known(every[name]) for one, every in said)
    return scores


def table(runs: Sequence[Scores], known: Sequence[Restaurant]) -> str:
    """Mean ± standard deviation over the seeds, as a table of Markdown."""

    def shown(composition: str, column: str) -> str:
        values = [scores[composition, column] for scores in runs]
        digits = 2 if column in LOSSES.values() else 0
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}" + ("" if digits else " %")

    lines = [f"| {row} | {' | '.join(shown(row, column) for column in COLUMNS)} |" for row in COMPOSITIONS]
    people = 100 * statistics.fmean(one.known(sentence) for one in known for sentence in one.sentences)
    for row, share in (("always the commonest facts", 100 * commonest(known)), ("the people who wrote them", people)):
        lines.append(f"| {row} | {'| ' * len(LOSSES)}| {share:.0f} % | |")
    return "\n".join([f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}", *lines])


def draw(runs: Sequence[Scores], file: Path) -> None:
    """The loss on facts against the loss on plays: a dot for each composition and seed."""
    axes = (figure := Figure(figsize=(7.6, 4.2), dpi=160, layout="constrained")).subplots()
    for number, composition in enumerate(COMPOSITIONS):
        x, y = ([scores[composition, column] for scores in runs] for column in ("loss, plays", "loss, facts"))
        axes.plot(x, y, "os"[number > 8], label=composition)
    axes.set(xlabel="loss on held-out plays, nats", ylabel="loss on held-out facts, nats")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)


def transcript(view: PeftModel, tokenizer: Any, prompts: Sequence[str]) -> str:
    """A few questions, and every composition's answer as it is; / for the end of a line."""
    said = [(prompt, answers(view, tokenizer, prompt)) for prompt in prompts]
    shown = ([prompt, *(f"[{k}] {v.replace(chr(10), ' / ')}" for k, v in every.items()), ""] for prompt, every in said)
    return "\n".join(line for lines in shown for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder with e2e_nlg and tinyshakespeare")
    parser.add_argument("--out", type=Path, default=Path("dialogue-out"), help="for everything that is written")
    parser.add_argument("--seeds", type=int, default=3, help="how often all is trained")
    parser.add_argument("--quick", action="store_true", help="a few steps, which show that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    few, shorter = (1, 25) if chosen.quick else (None, 1)
    known = restaurants(chosen.data / "e2e_nlg")
    write(chosen.data, chosen.out, few and 16 * few)
    tokenizer, out = AutoTokenizer.from_pretrained(chosen.model), chosen.out
    runs: list[Scores] = []
    for seed in range(1, (few or chosen.seeds) + 1):
        folders = [trained(run, chosen.model, out, seed, shorter) for run in ("joint", "staged", "together")]
        view = joined(chosen.model, *folders)
        view.generation_config.max_new_tokens = 20 if chosen.quick else 110
        runs.append(measured(view, tokenizer, known[:few], out))
        print(f"seed {seed} is done", flush=True)
        if seed == 1:
            (out / "transcript.txt").write_text(transcript(view, tokenizer, TOLD[:few]), encoding="utf-8")
    print(report := table(runs, known))
    (out / "table.md").write_text(report + "\n", encoding="utf-8")
    draw(runs, out / "dialogue.png")


if __name__ == "__main__":
    main()
