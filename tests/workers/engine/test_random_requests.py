"""Thousands of random requests through one engine that has too little of everything.

Few KV blocks (so requests are preempted), few bank rows (so adapters are evicted), adapters of all families and ranks,
one that cannot be loaded and one whose values overflow, three tenants with prompts in common, cancellations, deadlines.
What must hold: nothing leaks, everybody gets exactly one end, and who is answered is answered as if it were alone.

The suite runs part of it; all 10,000 requests, with 300 of them asked again alone, by

    python -m tests.workers.engine.test_random_requests 10000 300
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from storage.adapter_rows import AdapterRows
from storage.errors import AdapterRefusedError, UnknownModelError
from storage.identity import AdapterSet, AdapterVersion
from tests.workers.engine.small_engine import (
    Answer,
    Shelf,
    collect,
    random_adapter,
    run,
    small_settings,
    version,
)
from workers.engine.building import build_engine
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest, FinishReason, SamplingParams
from workers.models.loading import LoadedBase

VOCABULARY, LONGEST, NUM_ADAPTERS = 64, 512, 12
UNKNOWN, OVERFLOWING = version(100), version(101)
IN_FLIGHT = 120  # requests in the engine at a time
FAMILIES = ("flora", "flora0", "lora", "dora", "ia3_in", "ia3_out", "flora+lora", "untouched")


def tiny_base() -> LoadedBase:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2 * LONGEST,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.float64).eval()
    return LoadedBase(model, "0" * 64, Path("nowhere"))


def adapters(shapes: dict[str, tuple[int, int]]) -> dict[AdapterVersion, AdapterRows | Exception]:
    """Ranks 1 to 16, differing from module to module; every third adapter mixes families."""
    made: dict[AdapterVersion, AdapterRows | Exception] = {}
    for number in range(NUM_ADAPTERS):
        random = Random(number)
        rank = random.choice([1, 1, 2, 4, 8, 16])
        family = random.choice(FAMILIES)
        mixed = random.sample(FAMILIES, 3)
        made[version(number)] = random_adapter(
            shapes,
            family if number % 3 else lambda module, mixed=mixed: mixed[module % 3],
            lambda module, rank=rank: 1 + (rank - 1 + module) % rank,
            seed=number,
        )
    made[UNKNOWN] = UnknownModelError("the adapter is gone", param="model")
    made[OVERFLOWING] = random_adapter(shapes, "flora", 2, seed=101, size=1e200)
    return made


def requests(count: int, seed: int) -> list[EngineRequest]:
    """Lengths from 1 to 512, most of them short; half the prompts begin as others of the same adapter do."""
    random = Random(seed)
    shared = [tuple(random.choices(range(2, VOCABULARY), k=90)) for _ in range(3)]
    users: list[AdapterVersion | None] = [version(number) for number in range(NUM_ADAPTERS)]
    users += [None, None, UNKNOWN, OVERFLOWING]
    weights = [1 / (1 + place) for place in range(len(users))]

    def length(most_often_about: int) -> int:
        if random.random() < 0.01:
            return random.randint(1, LONGEST)
        return min(LONGEST, 1 + int(random.expovariate(1 / most_often_about)))

    made = []
    for number in range(count):
        own = tuple(random.choices(range(2, VOCABULARY), k=length(8)))
        common = random.choice(shared)[: random.randint(1, 90)] if random.random() < 0.3 else ()
        (user,) = random.choices(users, weights)
        sampling = SamplingParams(
            max_tokens=length(24),
            temperature=random.choice([0.0, 0.0, 0.8]),
            seed=number,
            ignore_eos=random.random() < 0.5,
        )
        made.append(
            EngineRequest(
                f"r{number}",
                (common + own)[:LONGEST],
                sampling,
                AdapterSet.of(user),
                tenant=random.choice("aaab") + "x",
                deadline_s=random.uniform(0, 40) if random.random() < 0.02 else None,
                work_per_token=1.0 if user is None else random.choice([2.0, 5.0, 17.0]),
            )
        )
    return made


@dataclass
class Tape:
    """A clock of the test's own: a millisecond a step."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


TIGHT = {"max_step_work": 1024, "kv_tokens": 2 * LONGEST + 16, "bank_rows": 48, "bank_slots": 8}
"""For 32 sequences hardly more KV blocks than one of the longest takes; a bank for half the adapters."""

ROOMY = {"prefix_cache": False, "bank_rows": 999, "bank_slots": 99}


def engine_with(room: dict[str, int | bool], clock: Tape) -> Engine:
    settings = small_settings(
        Path("nowhere"),
        runner="native",
        max_sequences=32,
        max_sequence_tokens=2 * LONGEST,
        max_step_tokens=96,
        kv_block_tokens=4,
        starvation_s=0.2,
        **room,
    )
    base = tiny_base()
    shapes = {
        path: (module.in_features, module.out_features)
        for path, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and not path.endswith("lm_head")
    }
    parts = build_engine(settings, Shelf(adapters(shapes)), base=base)
    return Engine(parts.runner, parts.bank, parts.loader, settings, clock=clock, wall_clock=clock)


@dataclass
class Crowd:
    """What became of the requests, and what was seen on the way."""

    answers: dict[str, Answer] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    steps: int = 0


def serve(engine: Engine, clock: Tape, wanted: list[EngineRequest], seed: int) -> Crowd:
    """Submit in bursts, cancel one in every fifty steps wherever it is, look at the books all the while."""
    random, crowd = Random(seed), Crowd()
    coming = iter(wanted)
    live: dict[str, None] = {}
    idle_since_s = time.monotonic()
    while True:
        if len(live) < IN_FLIGHT:
            for request in itertools.islice(coming, random.randint(0, IN_FLIGHT - len(live))):
                engine.submit(request)
                live[request.request_id] = None
        if live and random.random() < 0.02:
            name = random.choice(list(live))
            engine.abort(name)
            crowd.aborted.add(name)
        step = engine.step()
        collect(crowd.answers, step.outputs)
        for output in step.outputs:
            if output.finish_reason is not None:
                del live[output.request_id]
        clock.now_s += 0.001
        crowd.steps += 1
        if crowd.steps % 32 == 0:
            assert engine.check_integrity()
        if step.num_tokens or step.outputs:
            idle_since_s = time.monotonic()
        elif not live and len(crowd.answers) == len(wanted):
            return crowd
        else:
            assert time.monotonic() - idle_since_s < 60, f"{list(live)} wait for ever"
            time.sleep(0.0002)  # adapters are being loaded


def check(num_requests: int, num_again: int, seed: int) -> dict[str, object]:
    """Serve the crowd, hold it to all that is promised; returns what was seen."""
    clock = Tape()
    engine = engine_with(TIGHT, clock)
    wanted = {request.request_id: request for request in requests(num_requests, seed)}
    crowd = serve(engine, clock, list(wanted.values()), seed)

    # Nothing is left of anybody.
    engine.loader.stop()  # which may have been loading for somebody who is gone
    assert engine.check_integrity()
    assert engine.bank.references() == {}
    load = engine.load()
    assert (load.num_waiting, load.num_running, load.work) == (0, 0, 0)
    assert (load.kv_slots_used, load.kv_blocks_used) == (0, 0)
    assert load.step_errors == 0

    # Everybody has exactly one end (`collect` refuses a second), and for the reason that is its own.
    assert crowd.answers.keys() == wanted.keys()
    assert all(one.is_over for one in crowd.answers.values())
    whole = (FinishReason.STOP, FinishReason.LENGTH)
    for name, answer in crowd.answers.items():
        request = wanted[name]
        assert all(output.adapters == request.adapters for output in answer.outputs)
        match answer.reason:
            case FinishReason.ABORT:
                assert name in crowd.aborted or request.deadline_s is not None
            case FinishReason.ERROR if request.adapters.version == UNKNOWN:
                assert isinstance(answer.error, UnknownModelError)
            case FinishReason.ERROR:
                assert request.adapters.version == OVERFLOWING
                assert isinstance(answer.error, AdapterRefusedError)
            case reason:
                assert reason in whole
                assert request.adapters.version not in (UNKNOWN, OVERFLOWING)

    # Those who were answered were answered as if they were alone.
    finished = [name for name, one in crowd.answers.items() if one.reason in whole]
    sample = Random(seed).sample(finished, num_again)
    alone = engine_with(ROOMY, Tape())
    for name in sample:
        request = wanted[name]
        again = run(alone, [replace(request, deadline_s=None)])[name]
        assert again.tokens == crowd.answers[name].tokens, request
        assert again.reason is crowd.answers[name].reason
    return {
        "steps": crowd.steps,
        "tokens out": load.tokens_out,
        "preemptions": load.preemptions,
        "prompt tokens reused": load.prefix_tokens_reused,
        "adapter loads": load.loads,
        "adapter evictions": load.evictions,
        "ends": dict(Counter(str(one.reason) for one in crowd.answers.values())),
        "asked again alone": len(sample),
    }


def test_random_requests_leave_nothing_behind_and_are_answered_as_if_alone() -> None:
    seen = check(num_requests=2000, num_again=60, seed=0)
    # The engine really had too little of everything.
    assert all(seen[what] > 100 for what in ("preemptions", "adapter evictions"))
    assert seen["prompt tokens reused"] > 1000
    assert set(seen["ends"]) == {"stop", "length", "abort", "error"}


if __name__ == "__main__":
    sys.stdout.write(f"{check(int(sys.argv[1]), int(sys.argv[2]), seed=1)}\n")
