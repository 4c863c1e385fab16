"""The demo: a tiny language model that the project pretrains itself, and a task that it cannot do yet."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The folder of the tiny model."""
