"""MAD-X in small: a task learnt in English is used in French and Swahili by swapping the language adapter below it.

Pfeiffer et al. 2020, arXiv:2005.00052. A small encoder is pretrained here on the unlabelled sentences of SIB-200, then
frozen. Each language gets an adapter, trained on masked words of that language; a task adapter is trained on English
labels on top of the English one ("en >> task"), and evaluated with the others in its place ("fr >> task").
"""

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from coadapt import BottleneckConfig, PeftModel

FOLDERS = {"en": "eng_Latn", "fr": "fra_Latn", "sw": "swh_Latn"}
TOPICS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
PARTS = ("train", "test")
START, PAD, END, MASK = range(4)
SPECIAL = ["<s>", "<pad>", "</s>", "<mask>"]
MAJORITY = "always the commonest topic"
ADAPTERS = ("no adapter", *(f"adapter of {language}" for language in FOLDERS))
SETTINGS = ("task adapter alone", "English adapter left in", "adapters swapped (MAD-X)", "task trained in the language")
Data = Mapping[tuple[str, str], "Texts"]  # (language, part)
Scores = dict[tuple[str, str], float]  # (setting or adapter, language)


@dataclass(frozen=True)
class Sizes:
    """What a run costs; of pretraining, of a language and of a task the epochs."""

    rows: int | None = None  # of each file; None: all
    vocabulary: int = 4000
    width: int = 256
    pretraining: int = 8
    language: int = 3
    task: int = 10
    seeds: int = 3


QUICK = Sizes(rows=48, vocabulary=400, width=32, pretraining=1, language=1, task=2, seeds=2)


@dataclass(frozen=True)
class Texts:
    """Sentences as tokens, and the number of each one's topic."""

    ids: list[list[int]]
    topics: Tensor

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Input ids, padded on the right, and their mask, each (rows, T)."""
        longest = max(len(self.ids[i]) for i in rows)
        ids = torch.tensor([self.ids[i] + [PAD] * (longest - len(self.ids[i])) for i in rows])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    def masked(self, rows: Sequence[int], draw: torch.Generator) -> dict[str, Tensor]:
        """A batch of which 15 % of the tokens are to be guessed: of ten 8 masked, 1 another, 1 as it is (BERT)."""
        batch = self.batch(rows)
        ids = batch["input_ids"]
        chance = torch.rand(ids.shape, generator=draw) + (ids < len(SPECIAL))
        chosen = (chance < 0.15) | (chance == chance.min())
        others = ids.view(-1)[torch.randint(ids.numel(), ids.shape, generator=draw)]
        how = torch.rand(ids.shape, generator=draw)
        shown = torch.where(how < 0.8, MASK, torch.where(how < 0.9, others, ids))
        return {**batch, "input_ids": torch.where(chosen, shown, ids), "labels": ids.masked_fill(~chosen, -100)}

    def labelled(self, rows: Sequence[int], _: torch.Generator) -> dict[str, Tensor]:
        """A batch with its topics."""
        return {**self.batch(rows), "labels": self.topics[rows]}


def read(folder: Path, part: str, rows: int | None) -> list[dict[str, str]]:
    """The lines of one language's file: category, text."""
    with (folder / f"{part}.tsv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return found[:: len(found) // rows][:rows] if rows else found  # from all over: a file is sorted by topic


def tokenizer_of(sentences: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Pieces of bytes (BPE), learnt from these sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces = {"special_tokens": SPECIAL, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    made.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=size, show_progress=False, **pieces))
    ends = [("<s>", START), ("</s>", END)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", mask_token="<mask>")


def train(model: Any, groups: Any, texts: Texts, make: Callable[..., Any], epochs: int, size: int = 32) -> None:
    """AdamW, a rate that rises and falls; batches of sentences of about one length, drawn anew in each epoch."""
    draw = torch.Generator().manual_seed(torch.initial_seed())
    order: list[list[int]] = []
    for _ in range(epochs):
        for some in torch.randperm(len(texts.ids), generator=draw).split(8 * size):
            alike = sorted(some.tolist(), key=lambda row: len(texts.ids[row]))
            batches = [alike[i : i + size] for i in range(0, len(alike), size)]
            order += [batches[i] for i in torch.randperm(len(batches), generator=draw)]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], len(order), pct_start=0.06)
    model.train()
    for rows in order:
        model(**make(rows, draw)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def guessing(model: PeftModel, texts: Texts, adapters: Any) -> float:
    """The loss at masked tokens, in nats; the same tokens whatever is active."""
    draw = torch.Generator().manual_seed(0)
    batches = (texts.masked(rows.tolist(), draw) for rows in torch.arange(len(texts.ids)).split(64))
    return statistics.fmean(float(model(**batch, adapters=adapters).loss) for batch in batches)


@torch.no_grad()
def accuracy(model: PeftModel, texts: Texts, adapters: str) -> float:
    """Per cent of the sentences whose topic is found."""
    batches = (texts.batch(rows.tolist()) for rows in torch.arange(len(texts.ids)).split(64))
    found = torch.cat([model(**batch, adapters=adapters).logits.argmax(-1) for batch in batches])
    return 100 * float((found == texts.topics).float().mean())


def pretrain(folder: str, texts: Texts, sizes: Sizes) -> None:
    """Makes the base, trains all of it on masked tokens, and saves it."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=2 * sizes.width, num_hidden_layers=1,
        num_attention_heads=4, decoder_bias=False, sparse_prediction=True, classifier_pooling="mean", num_labels=7,
        pad_token_id=PAD, bos_token_id=START, cls_token_id=START, eos_token_id=END, sep_token_id=END,
    )  # fmt: skip
    base = ModernBertForMaskedLM(config)
    train(base, [{"params": list(base.parameters()), "lr": 2e-3}], texts, texts.masked, sizes.pretraining)
    base.save_pretrained(folder)


def languages(base: str, out: Path, data: Data, sizes: Sizes, seed: int) -> Scores:
    """Trains and saves an adapter for each language; how well each of them guesses words of each language."""
    model = PeftModel(ModernBertForMaskedLM.from_pretrained(base))
    for language in FOLDERS:
        torch.manual_seed(seed)
        model.add_adapter(language, BottleneckConfig(reduction_factor=2, inv_adapter="nice"))
        model.set_adapter(language)
        model.trainable(language)
        own = data[language, "train"]
        train(model, model.param_groups({language: 3e-3}), own, own.masked, sizes.language)
        model.save_pretrained(out, selected_adapters=[language])
    named: dict[str, Any] = dict(zip(ADAPTERS, ([], *FOLDERS), strict=True))
    return {(row, of): guessing(model, data[of, "test"], active) for row, active in named.items() for of in FOLDERS}


def tasks(base: str, out: Path, data: Data, sizes: Sizes, seed: int) -> Scores:
    """Trains task adapters, all but one on top of a saved language adapter; accuracy by setting and language."""
    model = PeftModel(ModernBertForSequenceClassification.from_pretrained(base))
    for language in FOLDERS:
        model.load_adapter(out / language, language)
    learnt = {"alone": ("alone", "en"), **{f"task-{of}": (f"{of} >> task-{of}", of) for of in FOLDERS}}
    for name, (composition, language) in learnt.items():  # what is active, and whose sentences are seen
        torch.manual_seed(seed)
        model.add_adapter(name, BottleneckConfig(reduction_factor=4, modules_to_save=["head", "classifier"]))
        model.set_adapter(composition)
        model.trainable(name)
        own = data[language, "train"]
        train(model, model.param_groups({name: 3e-3}), own, own.labelled, sizes.task, size=16)
    scores: Scores = {}
    for of in FOLDERS:
        used = ("alone", "en >> task-en", f"{of} >> task-en", f"{of} >> task-{of}")
        scores |= {(s, of): accuracy(model, data[of, "test"], active) for s, active in zip(SETTINGS, used, strict=True)}
    return scores


def table(scores: Mapping[tuple[str, str], list[float]], corner: str, rows: Sequence[str], digits: int) -> str:
    """Mean ± standard deviation over the seeds, as a table of Markdown."""
    cells: dict[tuple[str, str], str] = {}
    for key, values in scores.items():
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
        cells[key] = f"{statistics.fmean(values):.{digits}f}{spread}"
    lines = [f"| {row} | {' | '.join(cells[row, of] for of in FOLDERS)} |" for row in rows]
    return "\n".join([f"| {corner} | {' | '.join(FOLDERS)} |", f"|---|{'---|' * len(FOLDERS)}", *lines])


def draw(scores: Mapping[tuple[str, str], list[float]], file: Path) -> None:
    """Accuracy by language and setting, a dot for each seed."""
    axes = (figure := Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")).subplots()
    for number, (setting, color) in enumerate(zip(SETTINGS, ("#8a8a8a", "#2b6cb0", "#d9730d", "#0d9488"), strict=True)):
        every = [scores[setting, language] for language in FOLDERS]
        at = [i + 0.2 * (number - 1.5) for i in range(3)]
        axes.bar(at, [statistics.fmean(values) for values in every], 0.18, color=color, label=setting)
        axes.plot(at, every, "o", color="#222222", markersize=2.5)
    axes.axhline(scores[MAJORITY, "en"][0], color="#222222", linewidth=1, linestyle=":", label=MAJORITY)
    axes.set(xticks=range(3), xticklabels=["English", "French", "Swahili"], ylabel="topics found, %", ylim=(0, 65))
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper right")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with eng_Latn, fra_Latn and swh_Latn")
    parser.add_argument("--out", type=Path, default=Path("madx-out"), help="for adapters, the table and the picture")
    parser.add_argument("--quick", dest="sizes", action="store_const", const=QUICK, default=Sizes(), help="a few steps")
    sizes: Sizes = (chosen := parser.parse_args()).sizes
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def encoded(rows: Sequence[Mapping[str, str]]) -> Texts:
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)["input_ids"]
        return Texts(ids, torch.tensor([TOPICS.index(row["category"]) for row in rows]))

    rows = {(of, part): read(chosen.data / FOLDERS[of], part, sizes.rows) for of in FOLDERS for part in PARTS}
    every = [row for of in FOLDERS for row in rows[of, "train"]]
    tokenizer = tokenizer_of((row["text"] for row in every), sizes.vocabulary)
    data = {file: encoded(found) for file, found in rows.items()}
    share = data["en", "test"].topics == data["en", "train"].topics.mode().values  # the same in every language
    scores = {(MAJORITY, of): [100 * float(share.float().mean())] for of in FOLDERS}
    with tempfile.TemporaryDirectory() as base:
        pretrain(base, encoded(every), sizes)
        for seed in range(1, sizes.seeds + 1):
            guesses = languages(base, chosen.out, data, sizes, seed)
            for key, value in (guesses | tasks(base, chosen.out, data, sizes, seed)).items():
                scores.setdefault(key, []).append(value)
            print(f"seed {seed} of {sizes.seeds} is done", flush=True)
    tables = table(scores, "topics found, %", [MAJORITY, *SETTINGS], 1), table(scores, "loss, nats", ADAPTERS, 2)
    print(*tables, sep="\n\n")
    (chosen.out / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    draw(scores, chosen.out / "accuracy.png")


if __name__ == "__main__":
    main()
