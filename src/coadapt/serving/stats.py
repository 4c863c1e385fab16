"""What the engine tells of itself."""

from dataclasses import dataclass

from .request import Finish


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What the engine is at, and has done since it was made."""

    running: int
    """Rows that are written or whose prompts are read."""
    waiting: int
    prompt_tokens: int
    answer_tokens: int
    steps: int
    rows_per_step: float
    """Mean over all steps."""
    finished: dict[Finish, int]
    """Requests that are done, by how they ended."""
    known: int
    """Adapters that can be asked for."""
    attached: tuple[str, ...]
    """Those that are in memory."""
    loads: int
    """How often an adapter was attached."""
    evictions: int
    """How often one had to go for another."""
