"""A conversation: what the model is shown of it, what can be typed, what comes out of a pipe and of a terminal."""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import models
from byte_tokenizer import TEMPLATE, byte_tokenizer, save_base
from coadapt import LoraConfig, PeftModel, PromptTuningConfig
from coadapt.data.segments import Framing
from coadapt.demo import BASE
from coadapt.training.ask import answer
from coadapt.training.chat import Chat, Request, Turn
from coadapt.training.chat_commands import COMMANDS, Next, obey
from coadapt.training.load import Ready, load

Call = Callable[..., tuple[int, str, str]]
ROOM = 128
"""Positions of the small Llama."""


@pytest.fixture
def talk(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`coadapt chat ...` with lines from a pipe."""

    def talk(lines: list[str], *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return call("chat", "--max-new-tokens", 6, *args)

    return talk


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base whose tokenizer has a chat template."""
    folder = save_base(tmp_path_factory.mktemp("talker"))
    byte_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, all of which change answers."""
    out = tmp_path_factory.mktemp("adapters") / "three"
    view = PeftModel(AutoModelForCausalLM.from_pretrained(talker), LoraConfig(r=2), "task")
    view.add_adapter("style", LoraConfig(r=2))
    view.add_adapter("lead", PromptTuningConfig(num_virtual_tokens=8))
    models.stir(view.adapters, by=0.5)
    view.set_adapter("task")
    view.save_pretrained(out)
    return out


@pytest.fixture
def chat(talker: Path, adapter: Path) -> Chat:
    return Chat(load(str(talker), adapter), max_new_tokens=6)


def asked(chat: Chat, question: str, **options: Any) -> str:
    request = chat.request(question)
    found = chat.answer(request, **options)
    chat.keep(request, found)
    return found


def shown(chat: Chat, request: Request) -> str:
    return str(chat.ready.tokenizer.decode(request.inputs["input_ids"][0]))


def rendered(chat: Chat, *messages: tuple[str, str]) -> str:
    return "".join(f"<turn>{role}\n{text}</turn>\n" for role, text in messages) + "<turn>assistant\n"


# ---- what the model is shown -----------------------------------------------------------------------------------------


def test_the_whole_conversation_is_shown(chat: Chat) -> None:
    chat.set_system("Be kind.")
    chat.turns.append(Turn(question="a", answer="b"))
    wanted = rendered(chat, ("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert shown(chat, chat.request("c")) == wanted


def test_pieces_make_the_answer_that_generate_gives(chat: Chat, talker: Path, adapter: Path) -> None:
    alone = Ready(model=chat.ready.model, processor=chat.ready.tokenizer, framing=Framing(style="chat"))
    chat.max_new_tokens = 30
    pieces: list[str] = []
    found = chat.answer(chat.request("What?"), pieces.append)
    assert "".join(pieces) == found == answer(alone, "What?", max_new_tokens=30).strip() != ""
    base = chat.answer(chat.request("What?"), base=True)
    chat.use("none")
    assert found != base == chat.answer(chat.request("What?"))


def test_the_oldest_turns_go_when_the_room_is_full(chat: Chat) -> None:
    chat.turns = [Turn(question="q" * 5, answer=str(n) * 5) for n in range(6)]
    request = chat.request("last")
    kept = chat.turns[request.left_out :]

    def tokens(turns: list[Turn]) -> int:
        said = [m for t in turns for m in (("user", t.question), ("assistant", t.answer))]
        text = rendered(chat, *said, ("user", "last"))
        return len(chat.ready.tokenizer(text, add_special_tokens=False)["input_ids"])

    assert request.inputs["input_ids"].shape[1] == tokens(kept)
    assert tokens(kept) + 6 <= ROOM < tokens(chat.turns[request.left_out - 1 :]) + 6
    assert request.left_out > 0
    chat.use("lead + task")
    assert chat.room == ROOM - 8


def test_an_answer_is_shorter_where_there_is_little_room_and_refused_where_there_is_none(chat: Chat) -> None:
    frame = chat.request("").inputs["input_ids"].shape[1]
    assert chat.request("x" * (ROOM - frame - 2)).longest == 2
    asked(chat, "short")
    chat.ask_new()
    with pytest.raises(ValueError, match=rf"has {ROOM} tokens .* takes {ROOM} with the answer"):
        chat.request("x" * (ROOM - frame))
    assert chat.ask_again().startswith("xxx")
    assert [turn.question for turn in chat.turns] == ["short"]


def test_a_question_again_takes_the_place_of_the_last_answer_with_another_seed(chat: Chat) -> None:
    chat.temperature, chat.seed = 2.0, 7
    first = asked(chat, "a")
    chat.ask_new()
    second = asked(chat, "b")
    request = chat.request(chat.ask_again(), again=True)
    other = chat.answer(request)
    chat.keep(request, other)
    assert chat.turns == [Turn(question="a", answer=first), Turn(question="b", answer=other)]
    chat.tries = 0
    assert chat.answer(request) == second != other


def test_an_answer_can_be_stopped_and_what_was_said_stays(chat: Chat) -> None:
    chat.max_new_tokens = 30
    whole = asked(chat, "a")
    calls = iter([False, False, True])
    part = chat.answer(chat.request("a", again=True), stopped=lambda: next(calls))
    assert list(calls) == []
    assert whole.startswith(part.rstrip("\ufffd"))  # the last character may be cut in the middle
    assert 0 < len(part) < len(whole)


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (models.llama, {"trained": True, "framing": Framing(separator="\n")}, "trained without a chat template"),
        (models.llama, {"chat_template": None}, "no chat template: each question is put as it is"),
        (models.t5, {}, "encoder-decoder"),
        (models.bert, {}, "answers with a class"),
    ],
)
def test_where_there_is_no_conversation_each_question_is_put_by_itself(
    make: Callable[..., Any], options: dict[str, Any], reason: str
) -> None:
    tokenizer = byte_tokenizer(chat_template=options.pop("chat_template", TEMPLATE))
    options = {"framing": Framing(separator=""), **options}
    ready = Ready(model=make(vocab_size=len(tokenizer)), processor=tokenizer, **options)
    chat = Chat(ready, max_new_tokens=4)
    assert reason in str(chat.alone)
    found = asked(chat, "a")
    before = chat.request("b").inputs["input_ids"]
    chat.clear()
    assert before.equal(chat.request("b").inputs["input_ids"])
    assert found == answer(ready, "a", max_new_tokens=4).strip()
    with pytest.raises(ValueError, match="no place for a system prompt"):
        chat.set_system("x")


def test_a_template_without_a_place_for_a_system_prompt_is_told(talk: Call, talker: Path, tmp_path: Path) -> None:
    ready = load(str(talker), None)
    for template in (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    ):
        ready.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="no place for a system prompt in this model's chat template"):
            Chat(ready, system="Be kind.")


# ---- what can be typed -----------------------------------------------------------------------------------------------


def test_use_takes_any_composition_and_a_wrong_name_changes_nothing(chat: Chat) -> None:
    assert obey(chat, "/use task + 0.5*style") == ("active: task + 0.5*style", Next.WAIT)
    with pytest.raises(ValueError, match=r"no adapter 'stile'\. Did you mean 'style'"):
        obey(chat, "/use task + stile")
    with pytest.raises(ValueError, match="is no composition"):
        obey(chat, "/use task +")
    assert [(a.name, a.kind, a.weight) for a in chat.attached()] == [
        ("task", "lora", "1"),
        ("style", "lora", "0.5"),
        ("lead", "prompt_tuning", ""),
    ]
    assert chat.view is not None
    numbers = {name: chat.view.get_adapter(name).weight.numel() for name in ("task", "style", "lead")}
    assert {a.name: a.parameters for a in chat.attached()} == numbers
    assert "active: task + 0.5*style" in obey(chat, "/adapters")[0]
    assert obey(chat, "/use none")[0] == "active: the base alone"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adpters", "no command /adpters. Did you mean '/adapters'"),
        ("/use", "Use what"),
        ("/retry", "Nothing was asked"),
        ("/save", "Save where"),
        ("/save x.jsonl", "Nothing was said"),
        ("/clear all", "write /clear alone"),
    ],
)
def test_what_cannot_be_done_is_told(chat: Chat, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        obey(chat, line)


def test_help_names_every_command(chat: Chat) -> None:
    text = obey(chat, "/help")[0]
    assert [line.split()[0] for line in text.splitlines()] == list(COMMANDS)


def test_a_saved_conversation_is_what_training_reads(
    call: Call, talk: Call, talker: Path, adapter: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "said.jsonl", tmp_path / "out"
    lines = ["/system Be kind.", "hello", "again", f"/save {file}", "third", f"/save {file}"]
    code, text, said = talk(lines, "--model", talker, "--adapter", adapter)
    assert (code, "is there already" in said) == (0, True), said
    (row,) = (json.loads(line) for line in file.read_text("utf-8").splitlines())
    assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in row["messages"][:2]] == ["Be kind.", "hello"]
    assert text.startswith(row["messages"][2]["content"] + "\n")
    talk(["hello", f"/save --overwrite {file}"], "--model", talker, "--adapter", adapter)
    file.write_text(file.read_text("utf-8") * 8, "utf-8")
    code, text, said = call(
        "train",
        "--model",
        talker,
        "--data",
        file,
        "--method",
        "lora",
        "--max-steps",
        1,
        "--use-cpu",
        "--output-dir",
        out,
    )
    assert code == 0, said
    assert load(str(talker), out).framing.style == "chat"
    assert Chat(load(str(talker), out)).alone is None


# ---- a pipe, and a terminal ------------------------------------------------------------------------------------------


def test_answers_alone_come_out_of_a_pipe(talk: Call, talker: Path, adapter: Path) -> None:
    view = load(str(talker), adapter)
    one = answer(
        Ready(model=view.model, processor=view.tokenizer, framing=Framing(style="chat")), "a", max_new_tokens=6
    )
    code, text, said = talk(["a", "", "/use nothng", "/quit", "b"], "--model", talker, "--adapter", adapter)
    assert (code, text) == (0, one.strip() + "\n")
    assert said.endswith("error: There is no adapter 'nothng'. Attached: task, style, lead.\n")


def test_the_base_answers_beside_the_adapted_model(talk: Call, talker: Path, adapter: Path) -> None:
    _, base, _ = talk(["a"], "--model", talker)
    _, adapted, _ = talk(["a"], "--model", talker, "--adapter", adapter)
    _, both, _ = talk(["/compare", "/compare", "a"], "--model", talker, "--adapter", adapter, "--compare")
    assert both == f"base:\n{base}task:\n{adapted}"
    assert base != adapted


def test_several_compositions_answer_beside_each_other(talk: Call, talker: Path, adapter: Path) -> None:
    who = ["task", "0.5*style", "lead + task"]
    model = ["--model", talker, "--adapter", adapter]
    alone = {text: talk(["a"], *model, "--adapters", text)[1] for text in who}
    _, base, _ = talk(["a"], "--model", talker)
    assert len({base, *alone.values()}) == 4
    expected = f"base:\n{base}" + "".join(f"{text}:\n{said}" for text, said in alone.items())
    named = [part for text in who for part in ("--adapters", text)]
    assert talk(["a"], *model, *named, "--compare")[1] == expected
    typed = ["/compare 0.5*style", "/compare lead + task", "a", "/compare", "/clear", "a"]
    code, text, said = talk(typed, *model)
    assert (code, text) == (0, expected + alone["task"])
    assert "Beside it answer now: the base, 0.5*style, lead + task.\n" in said
    assert "The base and 0.5*style, lead + task keep quiet now.\n" in said
    assert talk(["/compare nobody"], *model)[2].endswith(
        "error: There is no adapter 'nobody'. Attached: task, style, lead.\n"
    )


def test_the_conversation_goes_on_with_what_is_active(chat: Chat) -> None:
    chat.put_beside("style")
    chat.put_beside("lead")
    assert [name for name, _ in chat.asked()] == ["the base", "task", "style", "lead"]
    assert chat.room == ROOM - 8  # the one of them with virtual tokens needs them
    request = chat.request("a")
    assert chat.answer(request, using="style") != chat.answer(request)
    chat.use("style")
    assert [name for name, _ in chat.asked()] == ["the base", "style", "lead"]


def test_a_mistake_of_ours_does_not_end_a_conversation(
    talk: Call, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Chat.request

    def breaks(self: Chat, question: str, **options: Any) -> Request:
        return {"a": real(self, question, **options)}[question]

    monkeypatch.setattr(Chat, "request", breaks)
    code, text, said = talk(["b", "a"], "--model", talker)
    assert (code, len(text.splitlines()) > 0) == (0, True)
    assert "error: KeyError: 'b'\n(this looks like a mistake in coadapt; COADAPT_DEBUG=1 shows where)" in said
    monkeypatch.setenv("COADAPT_DEBUG", "1")
    with pytest.raises(KeyError):
        talk(["b", "a"], "--model", talker)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--compare"], 2, "give --adapter too"),
        (["--adapter", ".", "--adapters", "a", "--adapters", "b"], 2, "give --compare too"),
        (["--adapters", "a"], 2, "give --adapter too"),
        ([], 1, "Which base? Give --model"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(talk: Call, args: list[str], code: int, message: str) -> None:
    found, _, said = talk(["a"], *args)
    assert (found, message in said) == (code, True), said


@pytest.mark.full
def test_at_a_terminal_tab_completes_ctrl_c_stops_the_answer_and_ctrl_d_ends() -> None:
    import pty

    program = "from coadapt.cli import main; main()"
    arguments = ["chat", "--model", str(BASE), "--raw", "--max-new-tokens", "230"]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", program, *arguments])
    seen, until = "", time.monotonic() + 120

    def read(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < until, seen
            seen += os.read(terminal, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]

    read("> ")
    os.write(terminal, b"/he\t\n")
    read("/retry")
    read("> ")
    os.write(terminal, b"One day Mia\n")
    read("Mia\r\n")
    read(" ")
    os.write(terminal, b"\x03")
    read("(stopped)")
    read("> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
