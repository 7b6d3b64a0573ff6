"""What the memory model says a training step takes, beside the peak that real steps reach.

Each case runs in a process of its own: it loads the base, takes steps at limits that are given to it, and tells the
largest resident size it had while it stepped (on a GPU, the most that was allocated). Linux only.

    python -m benchmarks.training_memory --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import parse, parser_of
from benchmarks.results_file import Row, own_side, print_rows, write_result
from training.activation_bytes import RunBytes
from training.activation_memory import measure_run
from training.adapter_run import AdapterData, AdapterRun
from training.frozen_base import FrozenBase
from training.job_memory import adapter_needs, base_shape
from training.memory_model import activation_bytes, estimated_runs, step_bytes
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainer import MultiAdapterTrainer
from workers.large_pages import kept_memory
from workers.models.loading import load_base

CLAIM = "What training takes of memory is known before it starts: never less than it takes, nor much more."
LOWEST, HIGHEST = 1.0, 1.3
SEED = 0
_STEPS = 2
_VOCABULARY = 40_000


@dataclass(frozen=True, slots=True)
class Case:
    """`adapters` of one shape, each with one sequence of `tokens` a step."""

    family: str
    rank: int
    adapters: int
    tokens: int
    dtype: str = "float32"
    is_checkpointed: bool = False
    beside: str | None = None
    """Of every second adapter, another family."""

    @property
    def title(self) -> str:
        kept = ", activations computed again" if self.is_checkpointed else ""
        rank = "" if self.family == "ia3" else f" r{self.rank}"
        other = f" and {self.beside}" if self.beside else ""
        return f"{self.adapters} {self.family}{other}{rank}, {self.tokens} tokens each, {self.dtype}{kept}"


CASES = (
    Case("flora", 1, 8, 64),
    Case("flora", 8, 2, 256),
    Case("dora", 4, 4, 64),
    Case("flora", 4, 2, 256, is_checkpointed=True),
    Case("lora", 64, 16, 16, dtype="bfloat16"),
    Case("flora", 5, 8, 64, dtype="bfloat16"),
    Case("flora", 8, 16, 32, dtype="bfloat16"),
    Case("flora", 4, 8, 96, dtype="bfloat16"),
    Case("lora", 8, 16, 8),
    Case("flora", 8, 6, 128, dtype="bfloat16", beside="dora"),
)


def measure(base: Path, rounds: int, cases: Sequence[Case] = CASES) -> list[Row]:
    """Two rows for each case: above the peak at least by the first bar, at most by the second."""
    rows = []
    for case in cases:
        ratios, again = [], []
        for _ in range(rounds):
            told = _in_a_process(base, case)
            ratios.append(told["estimate"] / told["peak"])
            again.append(told["fitted"] / told["peak"])
            mebibytes = {name: round(count / (1 << 20)) for name, count in told.items()}
            print(f"{case.title}: {mebibytes} MiB", flush=True)
        rows += [
            Row(f"{case.title}: estimate / peak", tuple(ratios), LOWEST),
            Row(f"{case.title}: estimate / peak, at most", tuple(ratios), HIGHEST, "lower"),
            Row(f"{case.title}: the same with measured activations / peak", tuple(again), LOWEST),
        ]
    return rows


def _in_a_process(base: Path, case: Case) -> dict[str, int]:
    ended = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--case", json.dumps(asdict(case)), str(base)],
        env={**os.environ, **kept_memory()},  # as a worker is started
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return told


def take_steps(case: Case, base: Path) -> dict[str, int]:
    """Bytes of the peak and of what was said before: from the configuration, and with measured activations."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, case.dtype)
    loaded = load_base(str(base), dtype, device)
    shape = base_shape(loaded.model.config, dtype)
    frozen = FrozenBase.adopt(
        loaded, max_tokens=case.tokens, checkpoint_activations=case.is_checkpointed
    )
    runs = [_run(case, number) for number in range(case.adapters)]
    needs = [adapter_needs(shape, run.spec, run.data) for run in runs]

    def said(of_runs: Mapping[str, RunBytes]) -> int:
        return step_bytes(
            shape,
            needs,
            activation_bytes(shape, needs, of_runs),
            max_resident=case.adapters,
            step_tokens=case.adapters * case.tokens,
            checkpoint=case.is_checkpointed,
        ).total

    estimate = said(estimated_runs(shape, needs))
    measured = {
        family: measure_run(frozen, next(run.spec for run in runs if run.spec.family == family))
        for family in {run.spec.family for run in runs}
    }
    fitted = said({run.name: measured[run.spec.family] for run in runs})
    trainer = MultiAdapterTrainer(
        frozen, runs, publish=_never, on_event=lambda event: None, max_step_tokens=1 << 30
    )
    _forget_peak(device)
    for _ in range(_STEPS):
        trainer.step()
    return {"estimate": estimate, "fitted": fitted, "peak": _peak(device)}


def _run(case: Case, number: int) -> AdapterRun:
    spec = AdapterSpec.model_validate(
        {
            "name": f"adapter-{number}",
            "data": "random.jsonl",
            "family": case.beside if case.beside and number % 2 else case.family,
            "rank": case.rank,
            "steps": 1_000_000,
            "batch_size": 1,
            "sequence_length": case.tokens + 1,
            "seed": SEED + number,
        }
    )
    generator = torch.Generator().manual_seed(SEED + number)
    tokens = torch.randint(3, _VOCABULARY, (case.tokens + 1,), generator=generator).tolist()
    sequence = TokenSequence(tuple(tokens), (True,) * len(tokens))
    return AdapterRun(spec, AdapterData((sequence,)), spec.num_steps(1))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) << 10


def _never(*_: Any) -> Any:
    raise RuntimeError("a benchmark publishes nothing")


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(take_steps(Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))))
        return
    arguments = parse(parser_of(__doc__, rounds=1))
    rows = measure(arguments.base, arguments.rounds)
    print_rows(rows)
    path = write_result(
        "training_memory",
        CLAIM,
        rows,
        seed=SEED,
        workload={"steps": _STEPS, "batch": "one sequence of uniform tokens per adapter and step"},
        sides=[own_side("each case")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
