"""What a batch of many adapters costs beside the same batch of the base model, in one engine, in one process.

32 concurrent requests of 64 prompt and 64 answer tokens, greedy; 16 adapters with random rows on every projection, two
requests each. Sides alternate within every round, so a ratio compares moments of the same machine. No HTTP, no Ray.

    python -m benchmarks.engine --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.results_file import Row, write_result
from storage.adapter_cache import CachedAdapter
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import UnknownModelError
from storage.identity import AdapterSet, AdapterVersion, sha256_hex
from workers.config import EngineSettings
from workers.engine.building import build_engine
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest, SamplingParams

NUM_REQUESTS, NUM_ADAPTERS, PROMPT_TOKENS, ANSWER_TOKENS = 32, 16, 64, 64
SEED = 0

# side → (family, rank, bar: its tokens per second / the base's; from the design's performance table)
SIDES: dict[str, tuple[str, int, float | None]] = {
    "16 FLoRA r1": ("flora", 1, 0.80),
    "16 FLoRA r4": ("flora", 4, 0.50),
    "16 LoRA r8": ("lora", 8, 0.75),
}


def random_adapter(
    family: str, rank: int, projections: dict[str, tuple[int, int]], generator: torch.Generator
) -> AdapterRows:
    """Rows large enough to change every answer, small enough to keep the model's numbers in range."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    def rows(num_in: int, num_out: int) -> ModuleRows:
        if family == "flora":
            return ModuleRows(mul_a_RO=normal(rank, num_out), mul_b_RI=normal(rank, num_in) * 20)
        return ModuleRows(add_q_EO=normal(rank, num_out), add_p_EI=normal(rank, num_in))

    return AdapterRows({path: rows(*shape) for path, shape in projections.items()})


def tokens_per_s(engine: Engine, versions: list[AdapterVersion | None], round_id: str) -> float:
    """Answer tokens per second of one batch, prefill included, adapters resident."""
    generator = torch.Generator().manual_seed(SEED)
    for number, version in enumerate(versions):
        prompt = torch.randint(3, 40_000, (PROMPT_TOKENS,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        adapters = AdapterSet.of(version)
        engine.submit(EngineRequest(f"{round_id}-{number}", tuple(prompt), sampling, adapters))
    tokens, began = 0, time.perf_counter()
    while engine.has_requests:
        for output in engine.step().outputs:
            if output.error is not None:
                raise output.error
            tokens += len(output.new_token_ids)
    return tokens / (time.perf_counter() - began)


def measure(base: str, rounds: int) -> list[Row]:
    """Ratios to the base of the same round, and the base's own tokens per second for scale."""
    adapters: dict[AdapterVersion, AdapterRows] = {}

    def source(version: AdapterVersion) -> CachedAdapter:
        if version not in adapters:
            raise UnknownModelError(f"no adapter {version}")
        return CachedAdapter(adapters[version], "host")

    settings = EngineSettings(
        base=base, max_sequences=NUM_REQUESTS, max_sequence_tokens=256, bank_rows=256
    )
    engine = build_engine(settings, source)
    generator = torch.Generator().manual_seed(SEED)
    sides: dict[str, list[AdapterVersion | None]] = {"base": [None] * NUM_REQUESTS}
    for side, (family, rank, _) in SIDES.items():
        versions = []
        for number in range(NUM_ADAPTERS):
            version = AdapterVersion(sha256_hex(f"{side} {number}".encode()))
            adapters[version] = random_adapter(
                family, rank, engine.runner.shape.projections, generator
            )
            versions.append(version)
        sides[side] = [versions[i % NUM_ADAPTERS] for i in range(NUM_REQUESTS)]

    for side, requests in sides.items():  # loads the adapters, and warms up
        tokens_per_s(engine, requests, f"warm-{side}")
    speed: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, requests in sides.items():
            speed[side].append(tokens_per_s(engine, requests, f"{number}-{side}"))
            print(f"round {number}  {side:<12} {speed[side][-1]:7.1f} tokens/s", flush=True)
    rows = [
        Row(
            f"{side} / our own base",
            tuple(mine / base for mine, base in zip(speed[side], speed["base"], strict=True)),
            bar=bar,
        )
        for side, (_, _, bar) in SIDES.items()
    ]
    return [*rows, Row("base, tokens per second", tuple(speed["base"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a model directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(str(arguments.base.expanduser()), arguments.rounds)
    for row in rows:
        print(f"{row.name:<28} {row.value:8.3f}   bar {row.bar}")
    claim = "A batch of 16 adapters costs little more than the same batch of the base model."
    print("wrote", write_result("engine", claim, rows, seed=SEED).name)


if __name__ == "__main__":
    main()
