"""HiRA, y = (W0 ∘ (1 + B A)) x, and FLoRA in its layout (`formats.flora`): mul rows, with A as b and B as a.

Source: HiRA, ICLR 2025; `peft.HiraConfig`.
"""

from __future__ import annotations

from storage.adapter_rows import ModuleRows
from storage.formats import flora
from storage.formats.family import AdapterFile, FamilyReader, ReadModule
from storage.formats.low_rank import Sides, read_ranks, read_sides, wrong_rank
from storage.formats.module_tensors import by_module
from storage.formats.peft_settings import COMMON_SETTINGS
from storage.formats.targets import Targets

IN_PART, OUT_PART = "hira_A", "hira_B"


def _read(file: AdapterFile) -> tuple[str, dict[str, ReadModule]]:
    sides, targets = {}, Targets(file.settings)
    for path, module in by_module("HIRA", file.tensors, (IN_PART, OUT_PART)).items():
        sides[path] = read_sides(module, IN_PART, OUT_PART)
        targets.check(path, sides[path].in_name)
    is_flora = flora.OFFSET in file.metadata
    if not is_flora:
        _check_ranks(file, sides)
    modules = {}
    for path, side in sides.items():
        rows = (
            flora.unpack(path, side.in_RI, side.out_RO, file.metadata)
            if is_flora
            else ModuleRows(mul_b_RI=side.in_RI, mul_a_RO=side.out_RO)
        )
        names = {"mul_b_RI": side.in_name, "mul_a_RO": side.out_name}
        modules[path] = ReadModule(rows, names)
    return ("flora" if is_flora else "hira"), modules


def _check_ranks(file: AdapterFile, sides: dict[str, Sides]) -> None:
    ranks, default = read_ranks(file.settings), file.settings["r"]
    for path, side in sides.items():
        # Some versions of PEFT write rank_pattern but make every HiRA module of rank r; the rank scales nothing.
        if side.rank not in (default, ranks.of(path)):
            raise wrong_rank(side, ranks.of(path))


READER = FamilyReader(
    peft_type="HIRA",
    settings=COMMON_SETTINGS
    | {
        *("r", "rank_pattern", "layers_to_transform", "layers_pattern"),
        *("init_weights", "hira_dropout"),
    },
    read=_read,
)
