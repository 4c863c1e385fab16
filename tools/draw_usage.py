"""Trains a router over three adapters of the demo's model and draws what it uses, for docs/routing.md.

python tools/draw_usage.py FOLDER      # about three minutes on two cores
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coadapt import PeftModel
from coadapt.cli import main as coadapt
from coadapt.cli.output import console
from coadapt.demo import BASE
from coadapt.demo.task import batch_of, exact_match, examples
from coadapt.training.run import train
from coadapt.training.settings import RunConfig

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "usage.png"
KINDS = {"place": "Where", "name": "Who", "color": "What"}
"""Adapter -> the first word of the questions that it learns to answer."""
ROUTED = "token_router(place, name, color)"
Row = dict[str, str]


def asked(row: Row, word: str) -> bool:
    """Whether a row's question begins with `word`."""
    return f"Q: {word}" in row["prompt"]


def train_adapters(folder: Path, rows: Sequence[Row]) -> None:
    """A LoRA for each kind of question, all in one run, each on its own rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, word in KINDS.items():
        lines = [json.dumps(row) + "\n" for row in rows if asked(row, word)]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    train(
        RunConfig(
            model=str(BASE),
            datasets={name: {"data": str(folder / f"{name}.jsonl"), "composition": name} for name in KINDS},  # type: ignore[arg-type]
            adapters={name: {"method": "lora", "r": 8, "learning_rate": 4e-3} for name in KINDS},  # type: ignore[arg-type]
            output_dir=str(folder / "adapters"),
            overwrite_output_dir=True,
            per_device_train_batch_size=24,
            max_steps=200,
            warmup_steps=0.1,
            use_cpu=True,
        ),
        console(),
    )


def train_router(model: PeftModel, tokenizer: Any, rows: Sequence[Row], steps: int = 120) -> None:
    """The router alone, on questions of all kinds."""
    model.set_adapter(ROUTED)
    model.freeze()
    optimizer = torch.optim.AdamW(model.param_groups({"gates": 1e-2}))
    model.train()
    for step in range(steps):
        some = rows[16 * step : 16 * (step + 1)]
        loss = model(**batch_of(tokenizer, some)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {float(loss):.3f}")
    model.eval()


def right(model: PeftModel, tokenizer: Any, rows: Sequence[Row], who: str) -> float:
    """The share of questions that are answered as wanted."""
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        adapters=who,
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return exact_match(texts, list(rows))


def main(folder: Path) -> None:
    """Trains, asks, saves, draws."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train_adapters(folder, examples("train", 4800, 0))
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder / "adapters")
    train_router(model, tokenizer, examples("train", 1920, 1))
    held_out = examples("held-out", 300, 2)
    for who in (*KINDS, "place + name + color", "0.33*place + 0.33*name + 0.33*color", ROUTED):
        shares = [right(model, tokenizer, [r for r in held_out if asked(r, word)], who) for word in KINDS.values()]
        print(f"{who}: " + ", ".join(f"{word} {share:.0%}" for word, share in zip(KINDS.values(), shares, strict=True)))
    model.save_pretrained(folder / "routed")
    coadapt(["show", str(folder / "routed"), "--picture", str(PICTURE)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
