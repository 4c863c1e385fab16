"""Pretrains the demo's base model: `python -m coadapt.demo.pretrain`."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coadapt.demo import BASE
from coadapt.demo.text import documents, repetitions, turn
from coadapt.demo.world import question, scene

SEED = 0
HELD_OUT_SEED = 1
END, PAD = "<|end|>", "<|pad|>"
CONTEXT = 256
BATCH = 32
REPETITION_STEPS = 400
MATRIX_RATE = 0.02
OTHER_RATE = 5e-3
WARM_UP = 100

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'A: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the world is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(SEED), 20_000), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """A Llama of 0.7 million parameters with grouped queries and tied embeddings, freshly initialised."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def curriculum(seed: int) -> Iterator[str]:
    """Repetitions first, so that the model learns to look back and copy, and then the text itself."""
    yield from islice(repetitions(seed), REPETITION_STEPS * BATCH)
    yield from documents(seed)


def batches(tokenizer: Any, texts: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches `{"input_ids", "labels"}`, `[BATCH, T]` each: one document a row, between two end tokens, padded.

    Documents never share a row, so what an answer asks for stands nowhere but in its own document. Eight batches are
    drawn at a time and sorted by length, which saves most of the padding.
    """
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    order = random.Random(SEED)
    rows = ([end, *tokenizer.encode(text, add_special_tokens=False), end] for text in texts)
    while pool := sorted(islice(rows, 8 * BATCH), key=len):
        for start in order.sample(range(0, len(pool), BATCH), math.ceil(len(pool) / BATCH)):
            ids = [torch.tensor(row) for row in pool[start : start + BATCH]]
            yield {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
            }


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 1024) -> float:
    """Mean loss in nats per token on documents of a seed that training never used."""
    total, count = 0.0, 0
    for batch in batches(tokenizer, islice(documents(HELD_OUT_SEED), rows)):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


@torch.no_grad()
def answered_right(model: Any, tokenizer: Any, sentences: int, count: int = 128) -> float:
    """The share of `count` fresh questions about scenes of `sentences` sentences that greedy decoding gets right."""
    rng = random.Random(HELD_OUT_SEED)
    prompts, answers = [], []
    for _ in range(count):
        placements = scene(rng, sentences)
        asked, answer = question(rng, rng.choice(placements))
        prompts.append(f"{' '.join(placement.sentence(rng) for placement in placements)}\n{turn(asked)}")
        answers.append(f" {answer}")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(text.startswith(answer) for text, answer in zip(said, answers, strict=True)) / count


def schedule(step: int, steps: int) -> float:
    """The share of the peak rate at `step`: linear warm-up, then half a cosine down to zero."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in layers)]
    return [
        torch.optim.Muon(layers, lr=MATRIX_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> int:
    """Trains `model` in place for `steps` steps, prints the loss now and then, and returns the tokens seen."""
    optimizing = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, steps)) for o in optimizing]
    started, tokens = time.monotonic(), 0
    for step, batch in enumerate(islice(batches(tokenizer, curriculum(SEED)), steps)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizing, *schedules):
            part.step()
        model.zero_grad()
        tokens += int((batch["labels"] != -100).sum())
        if step % 250 == 0 or step == steps - 1:
            right = answered_right(model, tokenizer, 2)
            took = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  answers {right:4.0%}  {took:5.0f} s", flush=True)
    return tokens


def card(model: LlamaForCausalLM, *, steps: int, tokens: int, loss: float, right: list[float], seconds: float) -> str:
    """The README.md that stands beside the weights."""
    version = torch.__version__.split("+")[0]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The demo's base model

A Llama of {model.num_parameters():,} parameters that tells stories, states facts and answers questions about
one small world. `coadapt demo` adapts it; it is good for nothing else.

- **Text:** generated by the project's own templates (`coadapt/demo/text.py`, `coadapt/demo/world.py`).
  No text or weights from anywhere else took part.
- **Made by:** `python -m coadapt.demo.pretrain --steps {steps}`, seed {SEED},
  in {seconds / 60:.0f} minutes on one CPU thread with torch {version}.
  Other versions give slightly other weights.
- **Trained on:** {tokens:,} tokens: {steps} steps of {BATCH} documents, after {REPETITION_STEPS} of which
  plain repetitions of words, which teach copying, give way to the text.
- **Held-out loss:** {loss:.4f} nats per token, on fresh text of seed {HELD_OUT_SEED}.
- **Answers:** {right[0]:.0%} of 128 fresh questions about one sentence are right, {right[1]:.0%} about two
  (choosing either sentence by chance gives 50%).
- **Tokenizer:** byte-level BPE, {model.config.vocab_size} tokens, trained on the same text.
  `{END}` begins and ends a document.
- **Licence:** Apache-2.0, like the project.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m coadapt.demo.pretrain", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=BASE, help="where to write the model")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same weights whatever the machine's number of cores
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    started = time.monotonic()
    tokens = pretrain(model, tokenizer, arguments.steps)
    seconds = time.monotonic() - started
    loss = held_out_loss(model.eval(), tokenizer)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    text = card(
        model,
        steps=arguments.steps,
        tokens=tokens,
        loss=loss,
        right=[answered_right(model, tokenizer, n) for n in (1, 2)],
        seconds=seconds,
    )
    (arguments.folder / "README.md").write_text(text, encoding="utf-8")
    print(f"held-out loss {loss:.4f}; written to {arguments.folder}")


if __name__ == "__main__":
    main()
