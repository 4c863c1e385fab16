"""MAD-X in small: a task learnt in English is used in French and Swahili by swapping the language adapter below it.

Pfeiffer et al. 2020, arXiv:2005.00052. A small encoder is pretrained here on the unlabelled sentences of SIB-200, then
frozen. Each language gets an adapter, trained on masked words of that language; a task adapter is trained on English
labels on top of the English one ("en >> task"), and evaluated with the others in its place ("fr >> task").

    python examples/madx/madx.py --data DIR     # DIR holds eng_Latn/train.tsv ..., as dadelani/sib-200 has them
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
START, PAD, END, MASK = 0, 1, 2, 3
SPECIAL = ["<s>", "<pad>", "</s>", "<mask>"]


@dataclass(frozen=True)
class Sizes:
    """What a run costs."""

    rows: int | None = None
    """Sentences of each file that are used; None: all."""
    vocabulary: int = 4000
    width: int = 256
    layers: int = 1
    pretraining: int = 10
    """Epochs; the same below."""
    language: int = 6
    task: int = 12
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


# ---- data ------------------------------------------------------------------------------------------------------------


def read(folder: Path, part: str, rows: int | None) -> list[tuple[str, str]]:
    """(topic, sentence) of one language's file."""
    with (folder / f"{part}.tsv").open(encoding="utf-8", newline="") as file:
        found = [(row["category"], row["text"]) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return found[:: len(found) // rows][:rows] if rows else found  # a part of every topic: files are sorted by it


def tokenizer_of(sentences: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Pieces of bytes (BPE), learnt from these sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(sentences, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", mask_token="<mask>")


def masked(texts: Texts, rows: Sequence[int], draw: torch.Generator) -> dict[str, Tensor]:
    """A batch in which 15 % of the tokens are to be guessed (at least one), and are masked."""
    batch = texts.batch(rows)
    ids = batch["input_ids"]
    chance = torch.rand(ids.shape, generator=draw) + (ids < len(SPECIAL))
    chosen = (chance < 0.15) | (chance == chance.min())
    return {**batch, "input_ids": ids.masked_fill(chosen, MASK), "labels": ids.masked_fill(~chosen, -100)}


# ---- training and measuring ------------------------------------------------------------------------------------------


def train(
    model: Any, groups: Any, count: int, epochs: int, seed: int, make: Callable[[list[int], torch.Generator], Any]
) -> None:
    """AdamW, a linear schedule down to 0, batches of 16 rows drawn anew in each epoch."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    order = [rows for _ in range(epochs) for rows in torch.randperm(count, generator=draw).split(16)]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(order))
    model.train()
    for rows in order:
        model(**make(rows.tolist(), draw)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def guessing(model: PeftModel, texts: Texts, adapters: Any) -> float:
    """The loss at masked tokens, in nats; the same tokens for whatever is active."""
    draw = torch.Generator().manual_seed(0)
    parts = [list(range(i, min(i + 64, len(texts.ids)))) for i in range(0, len(texts.ids), 64)]
    return statistics.fmean(float(model(**masked(texts, p, draw), adapters=adapters).loss) for p in parts)


@torch.no_grad()
def accuracy(model: PeftModel, texts: Texts, adapters: str) -> float:
    """Per cent of the sentences whose topic is found."""
    rows = torch.arange(len(texts.ids)).split(64)
    found = torch.cat([model(**texts.batch(r.tolist()), adapters=adapters).logits.argmax(-1) for r in rows])
    return 100 * float((found == texts.topics).float().mean())


# ---- the experiment --------------------------------------------------------------------------------------------------

SETTINGS = {
    "the task alone": "a task adapter trained on English, no language adapters",
    "English left in": '"en >> task" on every language',
    "swapped (MAD-X)": '"fr >> task" on French, "sw >> task" on Swahili; the task has seen English only',
    "trained on it": "a task adapter trained on the language itself, on top of its language adapter",
}
Scores = dict[tuple[str, str], list[float]]
"""(setting or adapter, language) -> one figure for each seed."""


def pretrained(folder: Path, texts: Texts, sizes: Sizes) -> None:
    """Makes the base, trains all of it on masked tokens, and saves it."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers, num_attention_heads=4, max_position_embeddings=512, classifier_pooling="mean",
        global_attn_every_n_layers=1, decoder_bias=False, sparse_prediction=True, num_labels=len(TOPICS),
        pad_token_id=PAD, bos_token_id=START, cls_token_id=START, eos_token_id=END, sep_token_id=END,
    )  # fmt: skip
    base = ModernBertForMaskedLM(config)
    groups = [{"params": list(base.parameters()), "lr": 2e-3}]
    train(base, groups, len(texts.ids), sizes.pretraining, 0, lambda rows, draw: masked(texts, rows, draw))
    base.save_pretrained(folder)


def languages(base: Path, out: Path, texts: Mapping[str, Mapping[str, Texts]], sizes: Sizes, seed: int) -> Scores:
    """Trains and saves an adapter for each language; how well each of them guesses words of each language."""
    model = PeftModel(ModernBertForMaskedLM.from_pretrained(base))
    for language, parts in texts.items():
        config = BottleneckConfig(reduction_factor=2, inv_adapter="nice", init_seed=seed)
        model.add_adapter(language, config)
        model.set_adapter(language)
        model.trainable(language)
        own = parts["train"]
        make = lambda rows, draw, own=own: masked(own, rows, draw)  # noqa: E731
        train(model, model.param_groups({language: 3e-3}), len(own.ids), sizes.language, seed, make)
        model.save_pretrained(out, selected_adapters=[language])
    rows = {"no adapter": [], **{f"the adapter of {language}": language for language in texts}}
    return {(row, of): [guessing(model, texts[of]["test"], a)] for row, a in rows.items() for of in texts}


def tasks(base: Path, out: Path, texts: Mapping[str, Mapping[str, Texts]], sizes: Sizes, seed: int) -> Scores:
    """Trains task adapters on top of the saved language adapters; accuracy by setting and language."""
    model = PeftModel(ModernBertForSequenceClassification.from_pretrained(base))
    for language in texts:
        model.load_adapter(out / language, language)

    def learn(name: str, composition: str, language: str) -> None:
        own_head = ["classifier", "head"]  # what stands between the pooled states and the topics, too
        model.add_adapter(name, BottleneckConfig(reduction_factor=4, modules_to_save=own_head, init_seed=seed))
        model.set_adapter(composition)
        model.trainable(name)
        own = texts[language]["train"]
        make = lambda rows, _: {**own.batch(rows), "labels": own.topics[rows]}  # noqa: E731
        train(model, model.param_groups({name: 3e-3}), len(own.ids), sizes.task, seed, make)

    learn("task", "en >> task", "en")
    learn("alone", "alone", "en")
    for other in ("fr", "sw"):
        learn(f"task-{other}", f"{other} >> task-{other}", other)
    scores: Scores = {}
    for language, parts in texts.items():
        own = "en >> task" if language == "en" else f"{language} >> task-{language}"
        compositions = ("alone", "en >> task", f"{language} >> task", own)
        for setting, composition in zip(SETTINGS, compositions, strict=True):
            scores[setting, language] = [accuracy(model, parts["test"], composition)]
    return scores


# ---- what came out ---------------------------------------------------------------------------------------------------


def table(scores: Scores, corner: str, digits: int) -> str:
    """Mean ± standard deviation over the seeds, as a table of Markdown."""
    rows = list(dict.fromkeys(row for row, _ in scores))
    head = f"| {corner} | {' | '.join(FOLDERS)} |\n|---|{'---|' * len(FOLDERS)}"
    lines = [f"| {row} | {' | '.join(_shown(scores[row, of], digits) for of in FOLDERS)} |" for row in rows]
    return "\n".join([head, *lines])


def _shown(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def draw(scores: Scores, majority: float, file: Path) -> None:
    """Accuracy by language and setting, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), dpi=160, layout="constrained")
    axes = figure.subplots()
    colors = ("#8a8a8a", "#2b6cb0", "#d9730d", "#0d9488")
    for number, (setting, color) in enumerate(zip(SETTINGS, colors, strict=True)):
        at = [i + 0.2 * (number - 1.5) for i in range(len(FOLDERS))]
        every = [scores[setting, language] for language in FOLDERS]
        axes.bar(at, [statistics.fmean(values) for values in every], 0.18, color=color, label=setting)
        for x, values in zip(at, every, strict=True):
            axes.plot([x] * len(values), values, "o", color="#222222", markersize=2.5, alpha=0.7)
    axes.axhline(majority, color="#222222", linewidth=1, linestyle=":")
    axes.annotate(
        "always the commonest topic", (2.42, majority), (0, 3), textcoords="offset points", ha="right", size=8
    )
    axes.set_xticks(range(len(FOLDERS)), ["English", "French", "Swahili"])
    axes.set_ylabel("topics found, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.25 * max(v for values in scores.values() for v in values))
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper right")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with eng_Latn, fra_Latn and swh_Latn")
    parser.add_argument("--out", type=Path, default=Path("madx-out"), help="for adapters, the table and the picture")
    parser.add_argument("--quick", action="store_true", help="a few sentences and steps: shows that it runs, no more")
    chosen = parser.parse_args()
    sizes = QUICK if chosen.quick else Sizes()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    pairs = {
        language: {part: read(chosen.data / folder, part, sizes.rows) for part in ("train", "test")}
        for language, folder in FOLDERS.items()
    }
    sentences = [text for parts in pairs.values() for _, text in parts["train"]]
    tokenizer = tokenizer_of(sentences, sizes.vocabulary)

    def encoded(rows: Sequence[tuple[str, str]]) -> Texts:
        return Texts(tokenizer([t for _, t in rows])["input_ids"], torch.tensor([TOPICS.index(c) for c, _ in rows]))

    texts = {language: {part: encoded(rows) for part, rows in parts.items()} for language, parts in pairs.items()}
    common = int(texts["en"]["train"].topics.mode().values)
    majority = 100 * float((texts["en"]["test"].topics == common).float().mean())
    chosen.out.mkdir(parents=True, exist_ok=True)
    guesses: Scores = {}
    found: Scores = {("always the commonest topic", language): [majority] for language in texts}
    with tempfile.TemporaryDirectory() as base:
        every = Texts([ids for parts in texts.values() for ids in parts["train"].ids], torch.empty(0))
        pretrained(Path(base), every, sizes)
        for seed in range(1, sizes.seeds + 1):
            for all_seeds, of_one in (
                (guesses, languages(Path(base), chosen.out, texts, sizes, seed)),
                (found, tasks(Path(base), chosen.out, texts, sizes, seed)),
            ):
                for key, values in of_one.items():
                    all_seeds.setdefault(key, []).extend(values)
            print(f"seed {seed} of {sizes.seeds} is done", flush=True)
    report = f"{table(found, 'topics found, %', 1)}\n\n{table(guesses, 'loss at masked tokens, nats', 3)}\n"
    print(report)
    (chosen.out / "table.md").write_text(report, encoding="utf-8")
    draw(found, majority, chosen.out / "accuracy.png")


if __name__ == "__main__":
    main()
