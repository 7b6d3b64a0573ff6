"""What it costs a request of the base model that adapters could be used beside it: nothing, within the interval.

Two engines in one process: one as it is served, 16 adapters resident and none used; in the other one every adapted
layer was replaced by the plain `nn.Linear` it stands for, the same runner, attention, scheduler and sampler around it.
Both answer the same batch, taking turns step by step, so that a round of both is one stretch of the machine's time.

    python -m benchmarks.unpatched --base ~/.flora/bases/smollm2-135m-instruct

Only the `hf` runner has layers to put back. A runner that has no module of its own per layer is compared with nothing
here; its base-only step is the base engine of `benchmarks.engine`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.own_engine import OwnEngine, first_token_agreement
from benchmarks.results_file import Row, own_side, print_rows, use_cores, write_result
from benchmarks.workload import Batch, random_adapter
from storage.base_checkpoint import read_base_facts
from storage.identity import AdapterVersion, sha256_hex
from workers.config import EngineSettings
from workers.engine.engine import Engine
from workers.models.hf import HfRunner
from workers.row_form.adapted_linear import AdaptedLinear

CLAIM = "Requests of the base model are as fast as in a model without adapted layers."
SEED = 0
BAR = 0.98
_WARM_UP_TOKENS = 4
_LEAST_AGREEMENT = 0.9


def unpatch(engine: Engine) -> int:
    """Put a plain `nn.Linear` over the same weight in every adapted layer's place; returns how many there were.

    The engine answers requests of the base model only from now on.
    """
    if not isinstance(engine.runner, HfRunner):
        raise TypeError(f"{type(engine.runner).__name__} has no adapted layers to put back")
    model = engine.runner._model
    adapted = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)
    }
    for path, layer in adapted.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _plain(layer))
    return len(adapted)


def _plain(layer: AdaptedLinear) -> nn.Linear:
    weight_OI = layer.base.dequantised_slice(slice(None), slice(None))
    bias_O = layer.base.bias_O
    with torch.device("meta"):
        plain = nn.Linear(layer.base.in_features, layer.base.out_features, bias=bias_O is not None)
    plain.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        plain.bias = nn.Parameter(bias_O, requires_grad=False)
    return plain


def measure(
    base: Path,
    rounds: int,
    *,
    batch: Batch | None = None,
    num_adapters: int = 16,
    settings: EngineSettings | None = None,
) -> list[Row]:
    """Unpatched seconds over patched seconds of each round: 1 when adapters cost nothing, less when they cost.

    Args:
        settings: of both engines, less the base and the sizes that follow from the batch.
    """
    batch = batch or Batch()
    sized = (settings or EngineSettings()).model_copy(
        update={
            "base": str(base),
            "runner": "hf",
            "max_sequences": batch.requests,
            "max_sequence_tokens": batch.prompt_tokens + batch.answer_tokens,
            "bank_rows": num_adapters,
            "bank_slots": num_adapters,
        }
    )
    projections = read_base_facts(base, base.name).projections
    generator = torch.Generator().manual_seed(SEED)
    adapters = {
        AdapterVersion(sha256_hex(str(number).encode())): random_adapter(
            "flora", 1, projections, generator
        )
        for number in range(num_adapters)
    }
    patched, unpatched = (
        OwnEngine.with_adapters(sized, adapters),
        OwnEngine.with_adapters(sized, {}),
    )
    try:
        unpatch(unpatched.engine)
        versions = list(adapters)
        used = [versions[number % num_adapters] for number in range(batch.requests)]
        patched.run(batch.prompts(seed=-1), used, _WARM_UP_TOKENS)  # brings them to the bank
        unpatched.run(batch.prompts(seed=-1), [None] * batch.requests, _WARM_UP_TOKENS)
        ratios = []
        for number in range(rounds):
            ratios.append(_ratio(patched, unpatched, batch, SEED + number))
            print(f"round {number}  {ratios[-1]:.4f}", flush=True)
    finally:
        patched.close()
        unpatched.close()
    name = "adapters enabled, none used / unpatched layers in the same runner"
    return [Row(name, tuple(ratios), BAR)]


def _ratio(patched: OwnEngine, unpatched: OwnEngine, batch: Batch, seed: int) -> float:
    prompts = batch.prompts(seed)
    sides = [patched, unpatched] if seed % 2 else [unpatched, patched]
    for side in sides:
        side.begin(prompts, [None] * batch.requests, batch.answer_tokens)
    going = True
    while going:
        going = any([side.step() for side in sides])
        sides.reverse()
    if first_token_agreement([patched.answered()], [unpatched.answered()]) < _LEAST_AGREEMENT:
        raise RuntimeError("the two engines answer differently: they do not run the same model")
    return unpatched.seconds / patched.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", type=Path, required=True, help="a model directory")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=Batch().requests)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    use_cores(arguments.threads)
    batch = Batch(requests=arguments.requests, answer_tokens=arguments.answer_tokens)
    rows = measure(arguments.base.expanduser(), arguments.rounds, batch=batch)
    print_rows(rows)
    path = write_result(
        "unpatched",
        CLAIM,
        rows,
        seed=SEED,
        workload=batch.as_dict(),
        sides=[own_side("patched"), own_side("unpatched")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
