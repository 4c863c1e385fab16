"""Rows put to a model, against the model asked one row at a time in the plainest way."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from byte_tokenizer import byte_tokenizer
from coadapt import LoraConfig, PeftModel
from coadapt.data.segments import Framing
from coadapt.demo.task import examples
from coadapt.evaluation.exam import Exam, asked_and_wanted
from coadapt.evaluation.metrics import METRICS, Response, chosen, exact_match
from coadapt.evaluation.scoring import Score, score, scores
from coadapt.training.ask import answer
from coadapt.training.load import Ready
from models import bert, gpt2, stir, t5

Make = Callable[..., Exam]
WHO = [None, "lora", "prompt", "prompt + 0.5*lora"]


def all_responses(view: PeftModel, exam: Exam, who: Any) -> list[Response]:
    found: dict[int, Response] = {}
    for batch in exam.batches:
        found |= exam.sit(view, who, batch)
    return [found[row] for row in range(len(exam.rows))]


@pytest.mark.parametrize("who", WHO)
def test_losses_are_the_model_s_own_of_each_row_alone(view: PeftModel, make: Make, who: Any) -> None:
    exam = make(metrics=("perplexity",), batch_size=4)
    found = all_responses(view, exam, who)
    for row, response in zip(exam.rows, found, strict=True):
        tokens = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.no_grad(), view.disable_adapter() if who is None else view.using(who):
            loss = view(**tokens).loss  # transformers' mean over the trained tokens
        assert response.tokens == sum(label != -100 for label in row["labels"])
        assert response.loss / response.tokens == pytest.approx(float(loss), rel=1e-4)
    whole = sum(r.loss for r in found) / sum(r.tokens for r in found)
    assert score(view, exam, who)["perplexity"].estimate.mean == pytest.approx(math.exp(whole))


@pytest.mark.parametrize("who", WHO)
def test_answers_are_those_of_generate_one_by_one(view: PeftModel, make: Make, tokenizer: Any, who: Any) -> None:
    exam = make(metrics=("exact_match",), batch_size=3)
    rows = examples("held-out", 6, 3)
    ready = Ready(model=view, processor=tokenizer, framing=Framing(separator=""))
    with view.disable_adapter() if who is None else view.using(who):
        alone = [answer(ready, row["prompt"], max_new_tokens=12) for row in rows]
    assert [response.answer for response in all_responses(view, exam, who)] == alone
    assert list(exam.wanted) == [row["completion"] for row in rows]
    assert [exam.asked(row) for row in range(6)] == [row["prompt"] for row in rows]


def test_nothing_of_the_view_is_changed(view: PeftModel, make: Make) -> None:
    active = view.composition
    view.train()
    score(view, make(2), "lora")
    assert view.training
    view.eval()
    score(view, make(2), "lora")
    assert not view.training
    assert view.composition == active


def test_a_row_near_the_last_position_is_asked_alone(view: PeftModel, make: Make) -> None:
    free = make(8, batch_size=4)
    lengths = [len(asked) for asked, _ in free.parts]
    room = max(lengths) + 11  # one token too few for the longest
    tight = make(8, batch_size=4, room=room)
    lone = [batch[0] for batch in tight.batches if len(batch) == 1]
    assert lone == [row for row, length in enumerate(lengths) if length == max(lengths)] != []
    assert sorted(row for batch in tight.batches for row in batch) == list(range(8))
    whole, cut = all_responses(view, free, "lora"), all_responses(view, tight, "lora")
    for row, (one, other) in enumerate(zip(whole, cut, strict=True)):
        assert other.answer is not None
        assert one.answer is not None
        assert one.answer.startswith(other.answer)
        assert row in lone or one.answer == other.answer


def test_learned_positions_are_not_overrun() -> None:
    """GPT-2 has no position beyond its last, and generation up to it works."""
    tokenizer = byte_tokenizer()
    view = PeftModel(gpt2(vocab_size=len(tokenizer), n_positions=24), LoraConfig(r=2))
    text = tokenizer("twelve chars").input_ids
    row = {"input_ids": [*text, 9, 2], "attention_mask": [1] * 15, "labels": [-100] * len(text) + [9, 2]}
    metrics = chosen(["exact_match"], "causal-lm", True)
    exam = Exam(rows=[row], task="causal-lm", metrics=metrics, tokenizer=tokenizer, room=24, max_new_tokens=100)
    assert exam.sit(view, None, [0])[0].answer is not None


def test_the_last_answer_of_a_talk_is_asked() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [-100, 2, 3, -100, -100, 6, 7, -100]}
    assert asked_and_wanted(row, "causal-lm") == ([1, 2, 3, 4, 5], [6, 7])
    assert asked_and_wanted({"input_ids": [1, 2], "labels": [5, 6, -100]}, "seq2seq") == ([1, 2], [5, 6])


def test_an_encoder_decoder_is_asked_as_it_was_trained() -> None:
    tokenizer = byte_tokenizer()
    view = PeftModel(t5(vocab_size=len(tokenizer)), LoraConfig(r=2), "a")
    stir(view.adapters, by=0.3)
    view.eval()
    pairs = [("one", "eins"), ("three", "drei"), ("a", "ein")]
    rows = [
        {
            "input_ids": (ids := tokenizer(a).input_ids),
            "attention_mask": [1] * len(ids),
            "labels": tokenizer(b).input_ids,
        }
        for a, b in pairs
    ]
    metrics = chosen(["exact_match", "loss"], "seq2seq", True)
    exam = Exam(rows=rows, task="seq2seq", metrics=metrics, tokenizer=tokenizer, batch_size=2, max_new_tokens=5)
    for row, response in zip(rows, all_responses(view, exam, "a"), strict=True):
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.no_grad():
            assert response.loss == pytest.approx(float(view(**batch).loss) * len(row["labels"]), rel=1e-4)
            del batch["labels"]
            out = view.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert response.answer == tokenizer.decode(out[0], skip_special_tokens=True)


def test_classes_are_the_likeliest_ones() -> None:
    tokenizer = byte_tokenizer()
    view = PeftModel(bert(vocab_size=len(tokenizer), num_labels=3), LoraConfig(r=2, task_type="SEQ_CLS"), "a")
    stir(view.adapters, by=0.5)
    view.eval()
    rows = [{**tokenizer(text), "labels": label} for label, text in enumerate(["short", "a longer text", "mid one"])]
    exam = Exam(
        rows=rows,
        task="sequence-classification",
        metrics=chosen([], "sequence-classification", False),
        tokenizer=tokenizer,
        classes=["x", "y", "z"],
        batch_size=2,
    )
    found = all_responses(view, exam, "a")
    with torch.no_grad():
        logits = [view(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert [response.answer for response in found] == ["xyz"[int(one.argmax())] for one in logits]
    assert [response.right for response in found] == [int(one.argmax()) == n for n, one in enumerate(logits)]
    expected = [float(-one.log_softmax(0)[n]) for n, one in enumerate(logits)]
    assert [response.loss for response in found] == pytest.approx(expected, rel=1e-4)
    made = scores(exam, found)
    assert made["accuracy"].estimate.mean == sum(response.right for response in found) / 3
    assert made["loss"].estimate.mean == pytest.approx(np.mean(expected), rel=1e-4)


def test_tags_count_one_by_one() -> None:
    """Accuracy of words, not of rows: 1 of 4 and 2 of 2 are 3 of 6."""
    metric = METRICS["accuracy"]
    found = [Response(tokens=4, right=1), Response(tokens=2, right=2)]
    values, weights = (np.array([f(r) for r in found]) for f in (lambda r: metric.value(r, ""), metric.weight))
    assert Score(metric=metric, values=values, weights=weights).estimate.mean == 0.5


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_a_share_and_a_mean_have_their_own_intervals(view: PeftModel, make: Make) -> None:
    exam = make(8, metrics=("exact_match", "rouge", "perplexity"))
    base, one = score(view, exam), score(view, exam, "lora")
    assert base["exact_match"].estimate.high == pytest.approx(1.959964**2 / (8 + 1.959964**2))
    assert list(one) == ["exact_match", "rouge1", "rouge2", "rougeL", "perplexity"]
    for name in one:
        assert one[name].less(base[name]).mean == pytest.approx(one[name].estimate.mean - base[name].estimate.mean)
        assert one[name].less(one[name]).low == -one[name].less(one[name]).high
        assert one[name].against(one[name]) == "within the spread"


def test_less_perplexity_is_better_and_fewer_right_answers_are_worse() -> None:
    def made(name: str, values: list[float]) -> Score:
        return Score(metric=METRICS[name], values=np.array(values), weights=np.ones(len(values)))

    low, high = made("loss", [1.0, 1.1, 1.2] * 4), made("loss", [2.0, 2.2, 2.1] * 4)
    assert (low.against(high), high.against(low)) == ("better", "worse")
    none, every = made("exact_match", [0.0] * 12), made("exact_match", [1.0] * 12)
    assert (every.against(none), none.against(every)) == ("better", "worse")
    few = [made("exact_match", [value] * 5) for value in (1.0, 0.0)]
    assert few[0].against(few[1]) == "within the spread"
    with pytest.raises(ValueError, match="the same rows"):
        low.less(every)


def test_rouge_is_the_share_of_common_words_in_order() -> None:
    """By hand: 3 of 4 words said are among the 6 wanted: P = 3/4, R = 1/2, F = 0.6; of pairs 2 of 3 and of 5: 0.5."""
    response = Response(answer="the cat sat there")
    wanted = "the cat sat on a mat"
    assert METRICS["rouge1"].value(response, wanted) == pytest.approx(0.6)
    assert METRICS["rouge2"].value(response, wanted) == pytest.approx(0.5)
    assert METRICS["rougeL"].value(Response(answer="sat the cat"), wanted) == pytest.approx(2 * 2 / 3 * 1 / 3)


def test_white_space_around_an_answer_does_not_count() -> None:
    assert exact_match(" thing: cup\n", "thing: cup") == 1
    assert exact_match("thing:  cup", "thing: cup") == 0


def test_a_loss_that_is_no_number_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"perplexity is not finite in 1 of 2 rows \(the first: 1\)"):
        scores(make(2, metrics=("perplexity",)), [Response(loss=1.0), Response(loss=math.nan)])


@pytest.mark.parametrize(
    ("names", "task", "asks", "said"),
    [
        (["perplexty"], "causal-lm", True, "Did you mean .perplexity"),
        (
            ["accuracy"],
            "causal-lm",
            True,
            "accuracy has no meaning for causal-lm; choose among exact_match, perplexity",
        ),
        (["rouge"], "sequence-classification", False, "choose among accuracy, loss"),
        (["exact_match"], "causal-lm", False, "texts without a prompt; choose among perplexity, loss"),
    ],
)
def test_metrics_without_a_meaning_are_refused(names: list[str], task: str, asks: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chosen(names, task, asks)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coadapt.evaluation.metrics.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rouge1 needs the package rouge_score: pip install 'coadapt\[eval\]'"):
        chosen(["rouge"], "causal-lm", True)


def test_rouge_refuses_what_it_cannot_read() -> None:
    """Its tokenizer drops all but a-z and 0-9: every answer in another script would score 0."""
    tokenizer = byte_tokenizer()
    asked, wanted = tokenizer("q").input_ids, tokenizer("شكرا", add_special_tokens=False).input_ids
    labels = [-100] * len(asked) + wanted
    row = {"input_ids": [*asked, *wanted], "attention_mask": [1] * len(labels), "labels": labels}
    metrics = chosen(["rouge"], "causal-lm", True)
    assert metrics[0].value(Response(answer="شكرا"), "شكرا") == 0
    with pytest.raises(ValueError, match=r"rouge1 knows Latin letters .* 1 of 1 wanted answers have none \('شكرا'"):
        Exam(rows=[row], task="causal-lm", metrics=metrics, tokenizer=tokenizer)


def test_rows_without_an_answer_are_refused(make: Make, tokenizer: Any) -> None:
    plain = {"input_ids": [4, 5], "attention_mask": [1, 1], "labels": [4, 5]}
    with pytest.raises(ValueError, match=r"1 of 1 rows have no prompt, or no answer"):
        Exam(rows=[plain], task="causal-lm", metrics=[METRICS["exact_match"]], tokenizer=tokenizer)
