"""What the tabs of one served page share."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from coadapt.ui import shown

if TYPE_CHECKING:
    from coadapt.ui.talk import Talker


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where runs are, which model is proposed, and the model that chats share."""

    runs: Path
    model: str = ""

    @cached_property
    def talker(self) -> "Talker":
        """The model that all chats share."""
        from coadapt.ui.talk import Talker  # imports torch, which the page does not wait for

        return Talker()

    def kept(self, what: str, default: Any) -> gr.BrowserState:
        """Something that a reload, or another start of the server, finds again: it stands in the browser.

        Under a name of this folder of runs, so that two pages, served one after another, do not mix theirs up.
        """
        place = hashlib.sha256(str(self.runs.resolve()).encode()).hexdigest()[:12]
        # It has to be the same at the next start. It guards nothing: what is kept is the person's own.
        return gr.BrowserState(default, storage_key=f"coadapt-{place}-{what}", secret="coadapt")


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What a tab puts back when the page is loaded: `restore(kept)` gives the values of `outputs`."""

    kept: gr.BrowserState
    restore: Callable[[Any], list[Any]]
    outputs: list[Any]
    after: tuple[Callable[..., Any], list[Any], list[Any]] | None = None
    """What follows from it: function, inputs, outputs."""


def wrong_with(text: str) -> gr.HTML:
    """The place of an error with this one in it; without one it takes no room."""
    return gr.HTML(shown.error(text), visible=bool(text))


COMPLAINTS = (ValueError, OSError, RuntimeError, TypeError, ImportError)
"""What a person is told of, in place of an answer; anything else is a mistake of ours, and stands in the terminal."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of events that follow from others: nothing flickers, and no program can call them from elsewhere."""
LOUD: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
