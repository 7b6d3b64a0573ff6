"""What it costs a request of the base model that adapters could be used beside it: nothing, within the interval.

Two engines in one process: one as it is served, 16 adapters resident and none used; in the other one every adapted
layer was replaced by a plain one over the same base weights (packed where they are packed, joined where they are
joined), with the same runner, attention, scheduler and sampler around it. Both answer the same batch, taking turns step
by step, so that a round of both is one stretch of the machine's time.

    python -m benchmarks.unpatched --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.command import add_runner, engine_settings, parse, parser_of
from benchmarks.own_engine import OwnEngine, first_token_agreement
from benchmarks.results_file import Row, own_side, print_rows, write_result
from benchmarks.workload import Batch, random_adapter
from storage.base_checkpoint import read_base_facts
from storage.identity import AdapterVersion, sha256_hex
from workers.config import EngineSettings
from workers.engine.engine import Engine
from workers.models.hf import HfRunner
from workers.models.native.runner import NativeRunner
from workers.row_form.adapted_linear import AdaptedLinear
from workers.row_form.base_linear import BaseLinear
from workers.row_form.joint_linear import JointLinear

CLAIM = "Requests of the base model are as fast as in a model without adapted layers."
SEED = 0
BAR = 0.98
_LEAST_AGREEMENT = 0.9


class PlainLinear(nn.Module):
    """What an adapted layer would be if there were no adapters."""

    def __init__(self, base: BaseLinear) -> None:
        super().__init__()
        self._base = base

    def forward(self, x: Tensor) -> Tensor:
        y = self._base.matmul(x)
        return y if self._base.bias_O is None else y + self._base.bias_O


class PlainJointLinear:
    """The same for projections that run as one product."""

    def __init__(self, joint: JointLinear) -> None:
        self._plain = PlainLinear(joint._joint)
        self._sizes = joint._sizes

    def __call__(self, x_TI: Tensor) -> tuple[Tensor, ...]:
        return torch.split(self._plain(x_TI), self._sizes, dim=1)


def unpatch(engine: Engine) -> int:
    """Put a plain layer in every adapted layer's place; returns how many there were.

    The engine answers requests of the base model only from now on.
    """
    runner = engine.runner
    if not isinstance(runner, HfRunner):
        raise TypeError(f"it is not known where {type(runner).__name__} keeps its layers")
    replaced = 0
    for block in runner._decoder._layers if isinstance(runner, NativeRunner) else ():
        for name, part in vars(block).items():
            if isinstance(part, AdaptedLinear):
                setattr(block, name, PlainLinear(part.base))
                replaced += 1
            elif isinstance(part, JointLinear):
                setattr(block, name, PlainJointLinear(part))
                replaced += len(part._sizes)
    if isinstance(runner, NativeRunner):
        return replaced
    model = runner._model
    for path, layer in list(model.named_modules()):
        if isinstance(layer, AdaptedLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PlainLinear(layer.base))
            replaced += 1
    return replaced


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
        patched.run(batch.prompts(seed=-1), used, batch.warm_up_tokens)  # brings them to the bank
        unpatched.run(batch.prompts(seed=-1), [None] * batch.requests, batch.warm_up_tokens)
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
    parser = parser_of(__doc__, rounds=20)
    add_runner(parser)
    parser.add_argument("--requests", type=int, default=Batch().requests)
    parser.add_argument("--answer-tokens", type=int, default=32)
    arguments = parse(parser)
    batch = Batch(requests=arguments.requests, answer_tokens=arguments.answer_tokens)
    rows = measure(
        arguments.base, arguments.rounds, batch=batch, settings=engine_settings(arguments)
    )
    print_rows(rows)
    path = write_result(
        "unpatched",
        CLAIM,
        rows,
        seed=SEED,
        workload={**batch.as_dict(), "runner": arguments.runner},
        sides=[own_side("patched"), own_side("unpatched")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
