"""One token for each row of a batch: the likeliest, or drawn as its request says, from numbers of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Chosen, Request

_AT_ONCE = 64
BROKEN = -1
"""In place of a token where the model gave no numbers."""


class Numbers:
    """Numbers in [0, 1), the same for the same seed, whoever else draws."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._left: list[float] = []

    def next(self) -> float:
        if not self._left:
            self._left = torch.rand(_AT_ONCE, generator=self._generator).tolist()
        return self._left.pop()


COLDEST = 1e-6
"""Below it the likeliest token is taken: all others have no chance, and scores divided by it no place in fp32."""


class Ways:
    """How each row of a batch chooses: made when rows come or go, and used at each step."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        drawing = [i for i, r in enumerate(requests) if r.temperature >= COLDEST]
        self.numbers = drawing
        """The rows that need a number."""
        chosen = [requests[i] for i in drawing]
        self.rows = torch.tensor(drawing, device=device)
        self.temperature = torch.tensor([r.temperature for r in chosen], device=device)[:, None]
        top_k = [r.top_k for r in chosen]
        self.most = max(top_k, default=0)
        self.top_k = torch.tensor(top_k, device=device)[:, None]
        self.cuts = any(r.top_p < 1 for r in chosen)
        self.top_p = torch.tensor([r.top_p for r in chosen], device=device)[:, None]
        self.told = [i for i, r in enumerate(requests) if r.logprobs is not None]
        """The rows that are told log-probabilities."""

    def choose(self, logits: Tensor, numbers: Sequence[float]) -> Tensor:
        """(B,) a token of each row of logits (B, V), BROKEN where they are no numbers.

        Args:
            numbers: one in [0, 1) for each of `self.numbers`.
        """
        most, chosen = logits.max(-1)
        if self.numbers:
            scores = logits.float() if len(self.numbers) == len(logits) else logits[self.rows].float()
            drawn = self._drawn(scores / self.temperature, torch.tensor(numbers, device=logits.device)[:, None])
            chosen = chosen.scatter(0, self.rows, drawn)
        return torch.where(most.isfinite(), chosen, BROKEN)

    def _drawn(self, scores: Tensor, at: Tensor) -> Tensor:
        """The tokens at these shares, (B, 1), of the probability, which is laid out in the vocabulary's order.

        What is left out is told by its score, not by its place among equals, which other rows could change.
        """
        if self.most:
            best = scores.topk(min(self.most, scores.shape[1])).values
            last = best.gather(1, (self.top_k.clamp(1, best.shape[1]) - 1))
            scores = scores.masked_fill((scores < last) & (self.top_k > 0), -torch.inf)
        chances = scores.softmax(-1)
        if self.cuts:
            best = chances.sort(-1, descending=True).values
            needed = ((best.cumsum(-1) - best) < self.top_p).sum(-1, keepdim=True)  # at least the first
            last = best.gather(1, needed.clamp(min=1) - 1)
            chances = chances.masked_fill((chances < last) & (self.top_p < 1), 0)
        below = chances.cumsum(-1)
        whole = below[:, -1:]
        share = (at * whole).minimum(torch.nextafter(whole, torch.zeros_like(whole)))
        return (below <= share).sum(-1)

    def tell(self, logits: Tensor, tokens: Sequence[int], requests: Sequence[Request]) -> dict[int, Chosen]:
        """What the rows are told that asked for log-probabilities."""
        if not self.told:
            return {}
        likely = logits[self.told].float().log_softmax(-1)
        best = likely.topk(min(max(requests[i].logprobs or 0 for i in self.told), likely.shape[1]))
        own = likely.gather(1, torch.tensor([[max(tokens[i], 0)] for i in self.told], device=logits.device))
        found: dict[int, Chosen] = {}
        for at, (i, mine, values, which) in enumerate(
            zip(self.told, own.flatten().tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            count = requests[self.told[at]].logprobs or 0
            found[i] = Chosen(token=tokens[i], logprob=mine, top=tuple(zip(which[:count], values[:count], strict=True)))
        return found
