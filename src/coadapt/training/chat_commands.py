"""What can be typed in a chat besides questions: `/use task + 0.5*style` and the like."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from coadapt.config import did_you_mean
from coadapt.training.chat import Chat


class Next(Enum):
    """How a chat goes on after a command."""

    WAIT = "wait for the next line"
    AGAIN = "ask the last question again"
    QUIT = "end"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: `run(chat, argument)` gives what is to be told, and how to go on."""

    argument: str = ""
    help: str
    run: Callable[[Chat, str], tuple[str, Next]]


def obey(chat: Chat, line: str) -> tuple[str, Next]:
    """Does what a line that begins with `/` asks for: what is to be told, and how to go on.

    Raises:
        ValueError, OSError: there is no such command, or it cannot be done; nothing was changed.
    """
    word, _, argument = line.partition(" ")
    if word not in COMMANDS:
        raise ValueError(f"There is no command {word}.{did_you_mean(word, COMMANDS)} /help lists them.")
    command, argument = COMMANDS[word], argument.strip()
    if argument and not command.argument:
        raise ValueError(f"{word} takes no {argument!r}; write {word} alone.")
    return command.run(chat, argument)


def _help(chat: Chat, argument: str) -> tuple[str, Next]:
    calls = {f"{word} {command.argument}".strip(): command.help for word, command in COMMANDS.items()}
    widest = max(map(len, calls))
    return "\n".join(f"{call:{widest}}  {text}" for call, text in calls.items()), Next.WAIT


def _adapters(chat: Chat, argument: str) -> tuple[str, Next]:
    rows = [(a.name, a.kind, f"{a.parameters:,}", a.weight or "-") for a in chat.attached()]
    if not rows:
        return "No adapter is loaded; the base answers.", Next.WAIT
    table = [("adapter", "kind", "parameters", "weight"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = [f"{n:{widths[0]}}  {k:{widths[1]}}  {p:>{widths[2]}}  {w:>{widths[3]}}" for n, k, p, w in table]
    return "\n".join([*lines, f"active: {chat.active}"]), Next.WAIT


def _use(chat: Chat, argument: str) -> tuple[str, Next]:
    if not argument:
        raise ValueError("Use what? Write /use task + 0.5*style, or /use none for the base alone.")
    return f"active: {chat.use(argument)}", Next.WAIT


def _system(chat: Chat, argument: str) -> tuple[str, Next]:
    chat.set_system(argument or None)
    return ("The system prompt is set." if argument else "There is no system prompt now."), Next.WAIT


def _retry(chat: Chat, argument: str) -> tuple[str, Next]:
    if chat.question is None:
        raise ValueError("Nothing was asked yet.")
    same = "" if chat.temperature else "The likeliest answer is the same again, unless something else has changed."
    return same, Next.AGAIN


def _save(chat: Chat, argument: str) -> tuple[str, Next]:
    flag, _, rest = argument.partition(" ")
    overwrite = flag == "--overwrite"
    name = rest.strip() if overwrite else argument
    if not name or name.startswith("--"):
        raise ValueError("Save where? Write /save FILE.jsonl, or /save --overwrite FILE.jsonl.")
    count = chat.save(Path(name).expanduser(), overwrite=overwrite)
    return f"Saved as {count} row{'s' * (count != 1)} of messages in {name}; coadapt train reads it.", Next.WAIT


def _clear(chat: Chat, argument: str) -> tuple[str, Next]:
    chat.clear()
    return "What was said is forgotten.", Next.WAIT


def _compare(chat: Chat, argument: str) -> tuple[str, Next]:
    if argument:
        chat.put_beside(argument)
        return f"Beside it answer now: {', '.join(name for name, how in chat.asked() if how)}.", Next.WAIT
    chat.set_compare(not chat.compare)
    others = "The base" if not chat.beside else f"The base and {', '.join(chat.beside)}"
    return f"{others} {_verb(chat)} now.", Next.WAIT


def _verb(chat: Chat) -> str:
    several = bool(chat.beside)
    if chat.compare:
        return "answer beside it" if several else "answers beside it"
    return "keep quiet" if several else "keeps quiet"


def _quit(chat: Chat, argument: str) -> tuple[str, Next]:
    return "", Next.QUIT


COMMANDS: Mapping[str, Command] = {
    "/adapters": Command(help="The adapters, and which are active with which weight.", run=_adapters),
    "/use": Command(argument="TEXT", help="Make a composition active: task + 0.5*style; none: the base.", run=_use),
    "/system": Command(argument="[TEXT]", help="Set the system prompt; without a text, take it away.", run=_system),
    "/retry": Command(help="Ask the last question again, drawn with another seed.", run=_retry),
    "/compare": Command(
        argument="[TEXT]", help="The base's answer beside it: on, or off; TEXT: that composition's, too.", run=_compare
    ),
    "/save": Command(argument="FILE", help="Write the conversation as rows that coadapt train reads.", run=_save),
    "/clear": Command(help="Forget what was said.", run=_clear),
    "/help": Command(help="This list.", run=_help),
    "/quit": Command(help="End; so do Ctrl-D and, when it is not answering, Ctrl-C.", run=_quit),
}
