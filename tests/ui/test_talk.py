"""Conversations with a gate for each adapter."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerCallback

from coadapt.core.composition import as_node
from coadapt.training.chat import Chat
from coadapt.training.load import load
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.ui.runs import standing
from coadapt.ui.talk import Asked, Talker, gated, gates_of, shown

ADAPTERS = {
    "task": {"method": "lora", "learning_rate": 0.05},
    "style": {"method": "prompt", "num_virtual_tokens": 2, "learning_rate": 0.5},
}


class Look(TrainerCallback):
    """How the run stands after each of its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[str]()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seen.append(standing(self.folder).state)


@pytest.fixture(scope="module")
def trained(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("run") / "out")
    how = {"max_steps": 4, "warmup_steps": 0, "use_cpu": True, "eval_split": 0, "composition": "task + 0.5*style"}
    run = RunConfig(model=base, data=rows, output_dir=out, adapters=ADAPTERS, **how)
    look = Look(Path(out))
    train(run, Console(file=StringIO()), [look])
    assert look.seen == ["running"] * 4
    assert standing(Path(out)).state == "done"
    return out


@pytest.mark.parametrize(
    ("text", "gates", "told"),
    [
        ("a + 0.5*b", {"a": 1.0, "b": 0.5}, "a + 0.5*b"),
        ("a + 0.5*b", {"a": 0.0, "b": 0.5}, "0.5*b"),
        ("a + 0.5*b", {"a": 0.0, "b": 0.0}, "the base"),
        ("a", {"a": 1.0, "b": 0.25}, "a + 0.25*b"),
        ("a", {"a": 2.0, "b": 0.0}, "2.0*a"),
        ("a >> b", {"a": 1.0, "b": 0.5}, "a >> (0.5*b)"),
        ("a >> b", {"a": 0.0, "b": 1.0}, "b"),
        ("0.5*(a + b) + c", {"a": 0.2, "b": 1.0, "c": 1.5}, "0.5*(0.2*a + b) + 1.5*c"),
        ("learned*a + b", {"a": 1.25, "b": 1.0}, "1.25*a + b"),
    ],
)
def test_gates_stand_before_their_adapters(text: str, gates: dict[str, float], told: str) -> None:
    assert shown(gated(as_node(text), gates)) == told


def last(talker: Talker, folder: str, question: str, how: Asked) -> dict[bool, str]:
    """Whose answer -> the whole of it."""
    return dict(talker.answers(folder, "", [], question, how))


def test_a_folder_says_its_gates_and_answers_with_them(trained: str) -> None:
    talker = Talker()
    loaded = talker.load(trained)
    assert loaded.gates.saved == "task + 0.5*style"
    assert loaded.gates.values == {"task": 1.0, "style": 0.5}
    assert loaded.alone is not None
    ready = load(None, Path(trained))
    chat = Chat(ready, max_new_tokens=8)
    request = chat.request("2+3=")
    expected = {text: chat.answer(request, using=text) for text in ("task + 0.5*style", "2*task", "0.5*task + style")}
    base = chat.answer(request, base=True)
    how = {"max_new_tokens": 8, "compare": True}
    assert last(talker, trained, "2+3=", Asked(**how)) == {False: expected["task + 0.5*style"], True: base}
    for text, gates in (("2*task", {"task": 2.0, "style": 0.0}), ("0.5*task + style", {"task": 0.5, "style": 1.0})):
        found = last(talker, trained, "2+3=", Asked(gates=gates, **how))
        assert found == {False: expected[text], True: base}
    none = last(talker, trained, "2+3=", Asked(gates={"task": 0.0, "style": 0.0}, **how))
    assert none[False] == none[True] == base
    assert expected["task + 0.5*style"] != base  # or the gates would have had nothing to change


def test_a_model_stays_until_another_is_asked_for(trained: str, base: str) -> None:
    talker = Talker()
    first = talker.load(trained)
    assert talker.load(f" {trained} ") is first
    alone = talker.load("", base)
    assert alone.gates.values == {}
    assert "the base answers" in alone.gates.why_none
    found = last(talker, trained, "1+1=", Asked(max_new_tokens=2))
    assert list(found) == [False]
    assert talker.load(trained) is not first


def test_what_cannot_be_loaded_or_asked_is_told(trained: str, tmp_path: Path) -> None:
    talker = Talker()
    with pytest.raises(ValueError, match="Choose a run"):
        talker.load("", "")
    with pytest.raises(FileNotFoundError, match="There is no adapter folder"):
        talker.load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="Ask something shorter"):
        list(talker.answers(trained, "", [], "long " * 500, Asked()))
    assert talker.load(trained).gates.values  # and it is none the worse


def test_gates_that_are_no_numbers_stay(trained: str) -> None:
    view = Talker().load(trained).ready.model
    view.set_adapter("token_router(task, task)")
    found = gates_of(view)
    assert found.values == {}
    assert "token_router chooses them" in found.why_none
