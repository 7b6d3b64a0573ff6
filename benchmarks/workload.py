"""What benchmarks ask of an engine: prompts, adapters with random rows, and who asks for which of them.

Knows nothing of engines. Everything follows from a seed, so both sides of a comparison get the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from storage.adapter_rows import AdapterRows, ModuleRows

Family = Literal["flora", "lora"]

# Prompts are made of tokens from here up to `Batch.vocabulary`: below are SmolLM2's special ones.
FIRST_TOKEN = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that arrive together, greedy, each answered by exactly `answer_tokens` tokens."""

    requests: int = 32
    prompt_tokens: int = 64
    answer_tokens: int = 64
    vocabulary: int = 40_000

    @property
    def warm_up_tokens(self) -> int:
        """Answer tokens of a batch that is not measured."""
        return min(4, self.answer_tokens)

    def prompts(self, seed: int) -> list[list[int]]:
        """Other prompts for another seed, so that no cache of prefixes helps anybody."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.requests, self.prompt_tokens)
        prompts: list[list[int]] = torch.randint(
            FIRST_TOKEN, self.vocabulary, shape, generator=generator
        ).tolist()
        return prompts

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sampling": "greedy, ignore_eos", "prompts": "uniform tokens"}


@dataclass(frozen=True, slots=True)
class Zipf:
    """Request i asks for adapter k of N with probability k⁻ˢ / Σ n⁻ˢ; adapters are numbered by popularity, from 0."""

    adapters: int
    exponent: float = 1.0

    def shares(self) -> list[float]:
        weights = [rank**-self.exponent for rank in range(1, self.adapters + 1)]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def top_share(self, count: int) -> float:
        """The share of requests that the `count` most popular adapters get."""
        return math.fsum(self.shares()[:count])

    def draw(self, count: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        shares = torch.tensor(self.shares(), dtype=torch.float64)
        drawn: list[int] = torch.multinomial(
            shares, count, replacement=True, generator=generator
        ).tolist()
        return drawn

    def as_dict(self) -> dict[str, Any]:
        return {
            "formula": f"Zipf: P(k) = k^-{self.exponent:g} / sum over n = 1..N of n^-{self.exponent:g}",
            "N": self.adapters,
            "top_1_share": round(self.top_share(1), 4),
            "top_10_share": round(self.top_share(10), 4),
        }


def random_adapter(
    family: Family,
    rank: int,
    projections: Mapping[str, tuple[int, int]],
    generator: torch.Generator,
    *,
    base_digest: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterRows:
    """Rows on every projection, large enough to change every answer, small enough to keep the numbers in range.

    FLoRA has offset 1 and its own b in each projection.
    """

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    def rows(num_in: int, num_out: int) -> ModuleRows:
        if family == "flora":
            return ModuleRows(mul_a_RO=normal(rank, num_out), mul_b_RI=normal(rank, num_in) * 20)
        return ModuleRows(add_q_EO=normal(rank, num_out), add_p_EI=normal(rank, num_in))

    return AdapterRows(
        {path: rows(*shape) for path, shape in projections.items()}, base_digest=base_digest
    )


def spread_ranks(count: int, lowest: int, highest: int, seed: int) -> list[int]:
    """`count` ranks, each from lowest to highest as often as any other (up to one), in random order."""
    ranks = [lowest + index % (highest - lowest + 1) for index in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [ranks[index] for index in order]
