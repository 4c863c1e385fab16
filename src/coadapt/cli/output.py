"""How verbs speak: the console, and the silence of the libraries below."""

import logging as python_logging
import os
import warnings
from typing import Any

import click

for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # what they lack here is told as they are imported
    python_logging.getLogger(_name).setLevel(python_logging.ERROR)

import datasets  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import logging  # noqa: E402


def console() -> Console:
    """Standard output; colours on terminals only, and never with NO_COLOR."""
    return Console(highlight=False)


def quiet() -> None:
    """Progress bars and advice of libraries away; coadapt says itself what matters. Errors are exceptions anyway."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|accelerate|datasets")
    warnings.showwarning = _warn


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"warning: {message}", err=True)
