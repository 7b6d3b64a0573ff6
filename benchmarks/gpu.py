"""The kernels on a GPU: right, and how far from what the card allows.

    python -m benchmarks.gpu --check               # numbers only, on the GPU
    python -m benchmarks.gpu --check --interpret   # the same in Triton's interpreter, tiny, on any machine
    python -m benchmarks.gpu                       # the check, then the table: under nine minutes on an H200
    python -m benchmarks.gpu --tune                # which tiles are fastest, for workers/kernels/tiles.py

Layers are StarCoder-15B's (hidden 6144, MLP 24576), the model a 1B-class Llama of random weights, all in bfloat16.
Floors are measured on the card. A section that fails is told and loses no other. `--check` and the layers need torch
and triton; whole models need transformers and pydantic too, training what jobs need.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.results_file import RESULTS, Row, print_rows, write_result

CLAIM = "On a GPU, many adapters cost little more than the base model, and less than LoRA by gathered products."
SEED = 0

Section = Callable[[int], list[Row]]


def sections() -> dict[str, Callable[[], Section]]:
    """By name; imported when their turn comes, so that what one of them lacks keeps no other from running."""

    def floors() -> Section:
        from benchmarks.gpu_layers import floors

        return floors

    def layers() -> Section:
        from benchmarks.gpu_layers import layers

        return layers

    def trained_layer() -> Section:
        from benchmarks.gpu_training import trained_layer

        return trained_layer

    def models() -> Section:
        from benchmarks.gpu_models import models

        return models

    def training() -> Section:
        from benchmarks.gpu_models import training

        return training

    return {
        "floors": floors,
        "layers": layers,
        "trained-layer": trained_layer,
        "models": models,
        "training": training,
    }


def measure(names: list[str], rounds: int, budget_s: float) -> tuple[list[Row], dict[str, str]]:
    """All rows that could be measured, and why others could not; none begins after the budget."""
    rows: list[Row] = []
    failures: dict[str, str] = {}
    began = time.monotonic()
    for name in names:
        if time.monotonic() - began > budget_s:
            failures[name] = f"left out: {budget_s:.0f} s were over"
            continue
        try:
            found = sections()[name]()(rounds)
        except Exception as error:
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            rows += found
            print_rows(found)
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.0f} s so far", flush=True)
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="numbers only")
    parser.add_argument("--interpret", action="store_true", help="--check without a GPU, tiny")
    parser.add_argument("--tune", action="store_true", help="times of other tiles")
    parser.add_argument("--only", nargs="+", choices=list(sections()), help="these sections")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=16, help="mixes to check")
    parser.add_argument("--budget-s", type=float, default=420)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --check --interpret needs none")

    from benchmarks.gpu_check import TINY, Sizes, check

    device = torch.device("cpu" if arguments.interpret else "cuda")
    sizes = TINY if arguments.interpret else Sizes()
    wrong = check(device, seeds=arguments.seeds, sizes=sizes)
    for line in wrong:
        print("WRONG ", line)
    if wrong:
        raise SystemExit(1)
    print(f"{arguments.seeds} mixes are as defined")
    if arguments.check or arguments.interpret:
        return
    if arguments.tune:
        from benchmarks.gpu_layers import tune

        tune(arguments.rounds)
        return
    rows, failures = measure(
        arguments.only or list(sections()), arguments.rounds, arguments.budget_s
    )
    for name, reason in failures.items():
        print(f"NOT MEASURED  {name}: {reason}")
    workload = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "not measured": failures,
    }
    path = write_result(
        "gpu", CLAIM, rows, seed=SEED, workload=workload, directory=arguments.results
    )
    print("wrote", path)


if __name__ == "__main__":
    main()
