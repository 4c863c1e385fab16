"""`coadapt chat`: a conversation with a base and its adapters, in a terminal or through a pipe."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coadapt.cli.completion import paths
from coadapt.cli.group import DEBUG, describe
from coadapt.cli.options import answering

if TYPE_CHECKING:
    from coadapt.training.chat import Chat, Request

WIDE = 100
"""Columns from which two answers stand beside each other."""

CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
"""What a model could steer a terminal with."""


def _invoke(model: str | None, adapter: Path | None, adapters: tuple[str, ...], use_cpu: bool, **options: Any) -> int:
    if len(adapters) > 1 and not options["compare"]:
        raise click.UsageError("Several --adapters answer side by side: give --compare too, or one of them.")
    if adapter is None:
        if adapters:
            raise click.UsageError("--adapters says which adapters of --adapter take part; give --adapter too.")
        if options["compare"]:
            raise click.UsageError("--compare puts the base beside its adapters; give --adapter too.")
    from coadapt.cli.output import quiet
    from coadapt.training.chat import Chat
    from coadapt.training.load import load, tasks_told
    from coadapt.training.machine import chosen

    quiet()
    first, *beside = adapters or (None,)
    ready = load(model, adapter, first, device=chosen(use_cpu))
    if (count := tasks_told(ready.model)) > 1:
        raise click.UsageError(f"What is active tells {count} tasks apart; coadapt generate --task asks for one.")
    Talk(Chat(ready, beside=[text for text in beside if text is not None], **options)).run()
    return 0


class Talk:
    """Lines in, answers out. Answers alone go to the standard output where that is no terminal."""

    def __init__(self, chat: "Chat") -> None:
        self.chat = chat
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self.left_out = 0

    def run(self) -> None:
        """Reads until the lines end, or one says so."""
        self._greet()
        for line in self._lines():
            if line.strip() and not self._heed(line.strip()):
                return

    def _greet(self) -> None:
        if self.live:
            name = getattr(self.chat.model, "name_or_path", "") or type(self.chat.model).__name__
            self._note(f"{name}, active: {self.chat.active}")
        if (reason := self.chat.alone) is not None:
            self._note(f"{reason[0].upper()}{reason[1:]}.")
        if self.live:
            self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.\n")

    def _lines(self) -> Iterator[str]:
        if not self.live:
            yield from sys.stdin
            return
        self._edit()
        while True:
            try:
                yield input("> ")
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return

    def _edit(self) -> None:
        """Editing, history and the Tab key for `input`, where Python has them (on Windows it has not)."""
        with suppress(ImportError):
            import readline

            from coadapt.training.chat_commands import COMMANDS

            def complete(begun: str, number: int) -> str | None:
                words = [*COMMANDS] if begun.startswith("/") else [adapter.name for adapter in self.chat.attached()]
                return ([word for word in words if word.startswith(begun)] + [None])[number]

            readline.set_completer(complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")

    def _heed(self, line: str) -> bool:
        """Obeys or asks; whether it goes on."""
        from coadapt.training.chat_commands import Next, obey

        try:
            if not line.startswith("/"):
                self.chat.ask_new()
                self._ask(line, again=False)
                return True
            told, then = obey(self.chat, line)
            if told:
                self._note(told)
            if then is Next.AGAIN:
                self._ask(self.chat.ask_again(), again=True)
            return then is not Next.QUIT
        except Exception as error:  # whatever it is, what was said so far is not lost
            if os.environ.get(DEBUG):
                raise
            click.echo(f"error: {describe(error)}", err=True)
            return True

    def _ask(self, question: str, again: bool) -> None:
        request = self.chat.request(question, again=again)
        self._note_room(request)
        with self._stoppable() as stop:
            found = self._both(request, stop) if self.chat.compare else self._one(request, stop)
        if stop.is_set():
            self._note("(stopped)" if found else "(stopped before it had said anything)")
        if found or not stop.is_set():
            self.chat.keep(request, found)
        if self.live:
            click.echo()

    def _note_room(self, request: "Request") -> None:
        if request.left_out > self.left_out:
            turns = "oldest turn is" if request.left_out == 1 else f"{request.left_out} oldest turns are"
            self._note(f"(the {turns} left out: the model takes {self.chat.room} tokens)")
        self.left_out = request.left_out
        if request.longest < self.chat.max_new_tokens:
            self._note(f"(there is room for {request.longest} tokens of an answer)")

    def _one(self, request: "Request", stop: threading.Event, **how: Any) -> str:
        try:
            return self.chat.answer(request, self._print, stopped=stop.is_set, **how)
        finally:
            click.echo()

    def _print(self, piece: str) -> None:
        click.echo(piece.translate(CONTROLS) if self.live else piece, nl=False)

    def _both(self, request: "Request", stop: threading.Event) -> str:
        """Everybody's answer; that of what is active is the one that the conversation goes on with."""
        from coadapt.cli.output import console

        screen, asked = console(), self.chat.asked()
        if self.live and screen.width >= WIDE * (len(asked) / 2):
            return self._beside(request, stop, screen)
        found = ""
        for name, how in asked:
            if stop.is_set():
                break
            click.echo(f"{name.removeprefix('the ') if how.get('base') else name}:")
            said = self._one(request, stop, **how)
            found = found if how else said
        return found

    def _beside(self, request: "Request", stop: threading.Event, screen: Any) -> str:
        """A column for each, which fill as the answers come."""
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        asked, found = self.chat.asked(), ""
        texts = [""] * len(asked)

        def shown() -> Table:
            table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
            for name, _ in asked:
                table.add_column(Text(name, "bold"), ratio=1, overflow="fold")
            table.add_row(*map(Text, texts))
            return table

        with Live(shown(), console=screen, refresh_per_second=8) as live:
            for column, (_, how) in enumerate(asked):

                def hear(piece: str, column: int = column) -> None:
                    texts[column] += piece
                    live.update(shown())

                said = "" if stop.is_set() else self.chat.answer(request, hear, stopped=stop.is_set, **how)
                found = found if how else said
        return found

    @contextmanager
    def _stoppable(self) -> Generator[threading.Event]:
        """Context: Ctrl-C sets the event, a second one breaks off at once. Where nobody sits there, it is as ever."""
        stop = threading.Event()
        if not self.live:
            yield stop
            return

        def press(*_: object) -> None:
            if stop.is_set():
                raise RuntimeError("Stopped in the middle of a token; the answer is not kept.")
            stop.set()

        before = signal.signal(signal.SIGINT, press)
        try:
            yield stop
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, text: str) -> None:
        """Something that is no answer."""
        click.secho(text, dim=self.live, err=not self.live)


command = click.Command(
    "chat",
    callback=_invoke,
    help="""Talk to a model with its adapters.

    \b
    coadapt chat --adapter DIR
    coadapt chat --adapter DIR --adapters "task + 0.5*style" --compare
    coadapt chat --adapter DIR --compare --adapters task --adapters style
    coadapt chat --model DIR_OR_ID --system "Answer in one sentence." < questions.txt

    With a chat template the model is shown the whole conversation. Without one, and for adapters that were trained
    without one, each question is put by itself, as in training. /help lists what else can be typed: other adapters,
    another try, saving it all as training data. Through a pipe, each line is a question and only answers come out.
    """,
    params=[
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the adapter names.",
        ),
        click.Option(
            ["--adapter"],
            type=click.Path(file_okay=False, path_type=Path),
            help="Adapter folder; left out, the base alone answers.",
        ),
        click.Option(
            ["--adapters"],
            multiple=True,
            help="Which of its adapters take part, as in `task + 0.5*style`; left out, as saved. With --compare it may "
            "be repeated: each answers, and the first one's answers make the conversation.",
        ),
        click.Option(["--system"], help="System prompt, where the model's chat template has a place for one."),
        click.Option(["--compare"], is_flag=True, help="The base's answer beside the adapted ones."),
        click.Option(
            ["--raw"], is_flag=True, help="Put each text as it is, without chat template or frame of training."
        ),
        *answering(),
    ],
)
