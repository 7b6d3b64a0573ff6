"""The bank's pages as trainable parameters: where each adapter's rows lie, and how they come out again.

Shape legend: K rows of one width W, N bank pages, I input features, O output features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from training.derived_rows import DerivedRows, MagnitudePlaces, ProjectionMagnitudes, ScaledBiases
from training.optimizer import RowBlock
from workers.bank.bank import AdapterBank
from workers.bank.layout import SlotPages
from workers.bank.module_bank import ModuleBank
from workers.bank.pages import NULL_PAGE
from workers.row_form.adapted_linear import AdapterLayers
from workers.row_form.base_linear import BaseLinear

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
            num_rows=_pages_needed(adapters.values()),
            num_slots=len(adapters),
            dtype=dtype,
            device=device,
            biases=layers.biases,
        )
        # A version is a digest of finished rows; in this bank an adapter still goes by its name.
        self.slots = [self.bank.load(AdapterVersion(name), rows) for name, rows in adapters.items()]
        self._pages = [self.bank.pages_of(AdapterVersion(name)) for name in adapters]
        self.blocks, self._first = _make_trainable(self.bank, _rows_apart(layers, self._pages))
        layers.bind(self.bank)
        self._apart = {width: len(block.weight_KW) for width, block in self.blocks.items()}
        self._places: dict[str, dict[int, MagnitudePlaces]] = {}
        self._index = [self._claim(number) for number in range(len(adapters))]
        self._magnitudes = {
            path: self._magnitudes_in(layers.layers[path].base, path) for path in self._places
        }
        biases = [
            ScaledBiases(bias_O, self._block(path, "out"), scaled)
            for path, bias_O in layers.biases.items()
            if (scaled := self._scaled_biases(path))
        ]
        self._derived: list[DerivedRows] = [*self._magnitudes.values(), *biases]
        self.refresh()

    def _block(self, path: str, side: str) -> RowBlock:
        return self.blocks[self._first[path, side][0]]

    def _rows(self, path: str, side: str, pages: Iterable[int]) -> tuple[int, ...]:
        """Pages of one projection's side as rows of their block."""
        return tuple(self._first[path, side][1] + page for page in pages)

    def _claim(self, number: int) -> dict[int, Tensor]:
        """By width, the trained rows of one adapter in an order that does not depend on who else is here."""
        index: dict[int, list[int]] = {}
        for path, pages in sorted(self._pages[number].items()):
            outs = self._rows(path, "out", pages.out_pages)
            layout = pages.layout
            if layout.has_scale and layout.num_add:
                place = self._place_apart(path, pages)
                self._places.setdefault(path, {})[number] = place
                outs = (*place.q, place.magnitude)
            elif layout.has_bias:
                outs = self._rows(path, "out", (pages.scale,))
            for side, owned in (("in", self._rows(path, "in", pages.in_pages)), ("out", outs)):
                index.setdefault(self._first[path, side][0], []).extend(owned)
        rows = {width: torch.tensor(own) for width, own in index.items() if own}
        for width, own_rows in rows.items():
            self.blocks[width].owner_K[own_rows] = number
        return rows

    def _place_apart(self, path: str, pages: SlotPages) -> MagnitudePlaces:
        """Take rows from the end of the block for what DoRA trains in a projection."""
        width = self._first[path, "out"][0]
        self._apart[width] -= len(pages.add_out) + 1
        apart = self._apart[width]
        return MagnitudePlaces(
            p=self._rows(path, "in", pages.add_in),
            q=tuple(range(apart, apart + len(pages.add_out))),
            read_q=self._rows(path, "out", pages.add_out),
            magnitude=apart + len(pages.add_out),
            read_scale=self._rows(path, "out", (pages.scale,))[0],
            gate=pages.layout.add_gate,
        )

    def _magnitudes_in(self, base: BaseLinear, path: str) -> ProjectionMagnitudes:
        return ProjectionMagnitudes(
            base,
            self._block(path, "in"),
            self._block(path, "out"),
            tuple(self._places[path].values()),
            zeros=(
                self._rows(path, "in", (NULL_PAGE,))[0],
                self._rows(path, "out", (NULL_PAGE,))[0],
            ),
        )

    def _scaled_biases(self, path: str) -> list[tuple[int, int]]:
        places = []
        for pages in self._pages:
            own = pages[path]
            if own.layout.has_bias:
                scale, bias = self._rows(path, "out", (own.scale, own.bias))
                places.append((scale, bias))
        return places

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what layers read up to what was trained. Call whenever an optimizer has changed that."""
        for derived in self._derived:
            derived.refresh()

    @torch.no_grad()
    def pull_gradients(self) -> None:
        """Bring the gradients of what layers read to what is trained. Call once after a step's backwards."""
        for derived in self._derived:
            derived.pull_gradients()

    def rows_of(self, number: int) -> AdapterRows:
        """One adapter as it is now, copied to the host."""
        return AdapterRows(
            {
                path: self._module_rows(number, path, start)
                for path, start in self._start[self._names[number]].modules.items()
            }
        )

    def _module_rows(self, number: int, path: str, start: ModuleRows) -> ModuleRows:
        module, pages = self.bank.modules[path], self._pages[number][path]
        mul_b_RI = _copied(module.in_rows_NI, pages.mul_in) if start.mul_b_RI is not None else None
        if start.mul_a_RO is not None:
            mul_a_RO = _copied(module.out_rows_NO, pages.mul_out)
            return ModuleRows(mul_b_RI=mul_b_RI, mul_a_RO=mul_a_RO, offset=start.offset)
        if mul_b_RI is not None:
            return ModuleRows(mul_b_RI=mul_b_RI)
        if not start.num_add:
            scale_O = _copied(module.out_rows_NO, (pages.scale,))[0] + 1
            return ModuleRows(scale_O=scale_O, bias_scale_O=scale_O)
        add_p_EI = _copied(module.in_rows_NI, pages.add_in)
        place = self._places.get(path, {}).get(number)
        if place is None:
            add_q_EO = _copied(module.out_rows_NO, pages.add_out)
            return ModuleRows(add_p_EI=add_p_EI, add_q_EO=add_q_EO, add_gate=start.add_gate)
        trained_KO = self._block(path, "out").weight_KW
        length_O = self._magnitudes[path].length_O
        return ModuleRows(
            add_p_EI=add_p_EI,
            add_q_EO=_copied(trained_KO, place.q),
            add_gate=start.add_gate,
            magnitude_O=(length_O + trained_KO[place.magnitude]).cpu(),
        )

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
        self.refresh()

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
        self.refresh()


def _pages_needed(adapters: Iterable[AdapterRows]) -> int:
    """The most pages in one projection, all adapters together."""
    total: dict[str, int] = {}
    for adapter in adapters:
        for path, rows in adapter.modules.items():
            total[path] = total.get(path, 0) + rows.num_pages
    return max(total.values())


def _rows_apart(layers: AdapterLayers, adapters: Iterable[Mapping[str, SlotPages]]) -> Counter[int]:
    """By width, the rows DoRA trains that no layer reads: its q and its magnitude."""
    apart: Counter[int] = Counter()
    for pages in adapters:
        for path, own in pages.items():
            if own.layout.has_scale and own.layout.num_add:
                apart[layers.projections[path][1]] += own.layout.num_add + 1
    return apart


def _make_trainable(
    bank: AdapterBank, apart: Counter[int]
) -> tuple[dict[int, RowBlock], dict[tuple[str, str], tuple[int, int]]]:
    """Put leaves that share one storage per width in the bank's place; `apart` more rows of zeros lie behind them.

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
        weight_KW = torch.cat([*members, members[0].new_zeros(apart[width], width)])
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
