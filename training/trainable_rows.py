"""The bank's pages as trainable parameters: where each adapter's rows lie, and how they come out again.

Shape legend: K rows of one width W, N bank pages, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from training.optimizer import RowBlock
from workers.bank.bank import AdapterBank
from workers.bank.module_bank import ModuleBank
from workers.row_form.adapted_linear import AdapterLayers

Weights = dict[str, Tensor]
"""One adapter's rows by width."""

State = dict[str, dict[str, Tensor]]
"""One adapter's rows by width: weights, and AdamW's moments."""


class TrainableRows:
    """A bank of its own for one set of adapters, all of which stay resident. Adapter i has slot `slots[i]`.

    Args:
        layers: of the model; bound to this bank from now on.
        adapters: initial rows by adapter name.
        dtype: of the rows: float32, or wider.
    """

    def __init__(
        self,
        layers: AdapterLayers,
        adapters: Mapping[str, AdapterRows],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._names = tuple(adapters)
        self._start = dict(adapters)
        self.bank = AdapterBank(
            layers.projections,
            num_rows=_rows_needed(adapters.values()),
            num_slots=len(adapters),
            dtype=dtype,
            device=device,
            biases=layers.biases,
        )
        self.blocks, places = _make_trainable(self.bank)
        layers.bind(self.bank)
        # A version is a digest of finished rows; in this bank an adapter still goes by its name.
        self.slots = [self.bank.load(AdapterVersion(name), rows) for name, rows in adapters.items()]
        self._index: list[dict[int, Tensor]] = [
            self._claim(number, name, places) for number, name in enumerate(self._names)
        ]

    def _claim(
        self, number: int, name: str, places: Mapping[tuple[str, str], tuple[int, int]]
    ) -> dict[int, Tensor]:
        """By width, the rows of one adapter in an order that does not depend on who else is here."""
        index: dict[int, list[int]] = {}
        for path, pages in sorted(self.bank.pages_of(AdapterVersion(name)).items()):
            for side, owned in (("in", pages.in_pages), ("out", pages.out_pages)):
                width, first = places[path, side]
                index.setdefault(width, []).extend(first + page for page in owned)
        rows = {width: torch.tensor(list(own)) for width, own in index.items() if own}
        for width, own_rows in rows.items():
            self.blocks[width].owner_K[own_rows] = number
        return rows

    def rows_of(self, number: int) -> AdapterRows:
        """One adapter as it is now, copied to the host."""
        name = self._names[number]
        pages = self.bank.pages_of(AdapterVersion(name))
        modules = {}
        for path, start in self._start[name].modules.items():
            module, taken = self.bank.modules[path], pages[path]
            if start.num_mul:
                modules[path] = ModuleRows(
                    mul_b_RI=_copied(module.in_rows_NI, taken.mul_in),
                    mul_a_RO=_copied(module.out_rows_NO, taken.mul_out),
                    offset=start.offset,
                )
            else:
                modules[path] = ModuleRows(
                    add_p_EI=_copied(module.in_rows_NI, taken.add_in),
                    add_q_EO=_copied(module.out_rows_NO, taken.add_out),
                    add_gate=start.add_gate,
                )
        return AdapterRows(modules)

    def weights_of(self, number: int) -> Weights:
        """What `put_weights` takes: one adapter's rows as they are now, copied to the host."""
        return {
            str(width): self.blocks[width].weight_KW[owned].cpu()
            for width, owned in self._index[number].items()
        }

    def put_weights(self, number: int, weights: Weights) -> None:
        """Give an adapter the rows it had once; AdamW's moments stay."""
        for width, owned in self._index[number].items():
            block = self.blocks[width].weight_KW
            block[owned] = weights[str(width)].to(block.device, block.dtype)

    def state_of(self, number: int) -> State:
        """What `restore` takes, in a trainer with any other adapters beside this one."""
        return {
            str(width): {
                name: tensor[owned].cpu() for name, tensor in self.blocks[width].state.items()
            }
            for width, owned in self._index[number].items()
        }

    def restore(self, number: int, state: State) -> None:
        """Raises KeyError or RuntimeError if the state is of an adapter of another shape."""
        for width, owned in self._index[number].items():
            for name, tensor in self.blocks[width].state.items():
                tensor[owned] = state[str(width)][name].to(tensor.device, tensor.dtype)


def _rows_needed(adapters: Iterable[AdapterRows]) -> int:
    """The most rows in one projection, all adapters together."""
    total: dict[str, int] = {}
    for adapter in adapters:
        for path, rows in adapter.modules.items():
            total[path] = total.get(path, 0) + rows.num_mul + rows.num_add
    return max(total.values())


def _make_trainable(
    bank: AdapterBank,
) -> tuple[dict[int, RowBlock], dict[tuple[str, str], tuple[int, int]]]:
    """Put leaves that share one storage per width in the bank's place.

    Returns the blocks by width, and for each (projection, side) its width and the first of its rows in the block.
    """
    nobody = bank.num_slots
    sides = [
        (path, side, tensor)
        for path, module in bank.modules.items()
        for side, tensor in (("in", module.in_rows_NI), ("out", module.out_rows_NO))
    ]
    by_width: dict[int, list[Tensor]] = {}
    places: dict[tuple[str, str], tuple[int, int]] = {}
    for path, side, tensor in sides:
        num_pages, width = tensor.shape
        members = by_width.setdefault(width, [])
        places[path, side] = (width, len(members) * num_pages)
        members.append(tensor)
    blocks = {}
    for width, members in by_width.items():
        weight_KW = torch.cat(members)
        owner_K = torch.full((weight_KW.shape[0],), nobody, device=bank.device)
        blocks[width] = RowBlock(weight_KW, owner_K)
    for path, module in bank.modules.items():
        bank.modules[path] = ModuleBank(
            in_rows_NI=_leaf(blocks, places[path, "in"], module.in_rows_NI.shape[0]),
            out_rows_NO=_leaf(blocks, places[path, "out"], module.out_rows_NO.shape[0]),
            bias_O=module.bias_O,
        )
    return blocks, places


def _leaf(blocks: Mapping[int, RowBlock], place: tuple[int, int], num_pages: int) -> Tensor:
    """Rows of a block as a parameter whose gradient is added up in the block's own gradient."""
    width, first = place
    block = blocks[width]
    leaf = block.weight_KW[first : first + num_pages].detach().requires_grad_(True)
    leaf.grad = block.gradient_KW[first : first + num_pages]
    return leaf


def _copied(rows_NW: Tensor, pages: tuple[int, ...]) -> Tensor:
    return rows_NW.detach()[torch.tensor(pages, device=rows_NW.device)].cpu()
