"""IA3: one vector l per module, which scales the inputs of feedforward modules and the outputs of all others.

An output side is a scale, of the base bias too, as in PEFT: y = l ∘ (W0 x + bias). An input side W0 (l ∘ x) becomes the
base product and one mul row with b = l − 1: l is close to 1, where 16 bits are too coarse for what was learnt.

Source: arXiv 2205.05638; `peft.tuners.ia3`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.adapter_rows import ModuleRows
from storage.errors import AdapterRefusedError
from storage.formats.family import AdapterFile, FamilyReader, ReadModule
from storage.formats.module_tensors import ModuleTensors, by_module
from storage.formats.peft_settings import COMMON_SETTINGS
from storage.formats.targets import Targets

PART = "ia3_l"


def _read(file: AdapterFile) -> tuple[str, dict[str, ReadModule]]:
    modules, targets = {}, Targets(file.settings)
    for path, module in by_module("IA3", file.tensors, (PART,)).items():
        targets.check(path, module.name(PART))
        modules[path] = _module(module, file.settings.get("feedforward_modules"))
    return "ia3", modules


def _module(module: ModuleTensors, feedforward: object) -> ReadModule:
    tensor, name = module.matrix(PART), module.name(PART)
    if _is_input_side(module.path, tensor, name, feedforward):
        return ReadModule(ModuleRows(mul_b_RI=_less_one(tensor)), {"mul_b_RI": name})
    scale_O = tensor.flatten()
    rows = ModuleRows(scale_O=scale_O, bias_scale_O=scale_O)
    return ReadModule(rows, {"scale_O": name, "bias_scale_O": name})


def _less_one(l_1I: Tensor) -> Tensor:
    """l − 1, in the type of l where that is exact (as it is from 0.5 on), else in float32."""
    b_1I = l_1I.to(torch.promote_types(l_1I.dtype, torch.float32)) - 1
    narrow_1I = b_1I.to(l_1I.dtype)
    return narrow_1I if torch.equal(narrow_1I.to(b_1I.dtype), b_1I) else b_1I


def _is_input_side(path: str, tensor: Tensor, name: str, feedforward: object) -> bool:
    """The shape says which side; a list of feedforward modules must agree. An expression is not run."""
    can_be_input, can_be_output = tensor.shape[0] == 1, tensor.shape[1] == 1
    if isinstance(feedforward, list):
        # Unlike for targets, PEFT does not ask for a dot before the name.
        is_input = any(path.endswith(str(module)) for module in feedforward)
        if can_be_input if is_input else can_be_output:
            return is_input
        expected = "[1, in]" if is_input else "[out, 1]"
        raise AdapterRefusedError(
            f"tensor {name!r} has shape {list(tensor.shape)}; expected {expected}, as the setting "
            "feedforward_modules says"
        )
    if can_be_input == can_be_output:
        raise AdapterRefusedError(
            f"tensor {name!r} has shape {list(tensor.shape)}; expected [1, in] or [out, 1], and which"
        )
    return can_be_input


READER = FamilyReader(
    peft_type="IA3",
    settings=COMMON_SETTINGS | {"feedforward_modules", "init_ia3_weights"},
    read=_read,
)
