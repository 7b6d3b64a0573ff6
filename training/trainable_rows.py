"""The bank's pages as trainable parameters: how adapters come to their rows, and how they come out again.

Shape legend: K rows of one width W, N bank pages, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from training.derived_rows import DerivedRows, ProjectionMagnitudes, ScaledBiases
from training.row_blocks import make_trainable
from training.row_places import Place, RowPlaces
from training.row_room import RowLayouts, RowRoom
from workers.bank.bank import AdapterBank
from workers.bank.layout import ModuleLayout
from workers.bank.pages import NULL_PAGE
from workers.row_form.adapted_linear import AdapterLayers

Weights = dict[str, Tensor]
"""One adapter's rows by width."""

State = dict[str, dict[str, Tensor]]
"""One adapter's rows by width: weights, and AdamW's moments."""


class TrainableRows:
    """A bank of its own for the adapters of one trainer, of which at most `max_resident` have rows at a time.

    Adapters go by their number. Who has a place keeps it until `release`; the next one takes over its slot, its pages
    and its rows of the optimizer.

    Args:
        layers: of the model; bound to this bank from now on.
        adapters: the shape of each adapter that may ever come.
        dtype: of the rows: float32, or wider.
    """

    def __init__(
        self,
        layers: AdapterLayers,
        adapters: Sequence[RowLayouts],
        max_resident: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers = layers
        self._layouts = tuple(adapters)
        self.max_resident = max_resident
        layers.unbind()  # the bank of a trainer that is gone makes room for this one
        room = RowRoom.of(adapters, layers.projections, max_resident)
        self.bank = AdapterBank(
            layers.projections,
            num_rows=room.num_pages,
            num_slots=max_resident,
            dtype=dtype,
            device=device,
            biases=layers.biases,
        )
        self._nobody = len(adapters)
        self.blocks, first = make_trainable(self.bank, room.apart, nobody=self._nobody)
        layers.bind(self.bank)
        num_rows = {width: len(block.weight_KW) for width, block in self.blocks.items()}
        self._places = RowPlaces(first, num_rows, room.apart)
        self._residents: dict[int, Place] = {}
        self._magnitudes: dict[str, ProjectionMagnitudes] = {}
        self._biases: dict[str, ScaledBiases] = {}

    # Coming and going.

    @property
    def has_room(self) -> bool:
        """One more adapter, whichever, finds a place."""
        return len(self._residents) < self.max_resident

    @property
    def residents(self) -> frozenset[int]:
        return frozenset(self._residents)

    def slot_of(self, number: int) -> int:
        """The bank slot of an adapter that has a place."""
        return self._residents[number].slot

    def admit(self, number: int, rows: AdapterRows) -> None:
        """Give an adapter a place, with moments of zero. Raises ValueError when there is none for it."""
        if not self.has_room or number in self._residents:
            raise ValueError(f"there is no place for adapter {number}")
        slot = self.bank.load(_version(number), rows)
        self.bank.acquire(_version(number))  # a bank may evict whom nobody holds
        self._residents[number] = self._places.claim(slot, self.bank.pages_of(_version(number)))
        for width, trained in self._residents[number].trained.items():
            self.blocks[width].owner_K[trained] = number
        self._derive_again(number)

    @torch.no_grad()
    def release(self, number: int) -> None:
        """Free an adapter's place. Its rows become zeros, whatever they held."""
        self._zero(number)
        resident = self._residents.pop(number)
        for width, owned in resident.owned.items():
            self.blocks[width].owner_K[owned] = self._nobody
        self._places.give_back(resident)
        self.bank.release(_version(number))
        self.bank.evict(_version(number))
        self._derive_again(number)

    @torch.no_grad()
    def clear(self, number: int) -> None:
        """Rows and moments of zero, whatever they held, for an adapter that keeps its place."""
        self._zero(number)
        self.refresh()

    def _zero(self, number: int) -> None:
        for width, owned in self._residents[number].owned.items():
            for tensor in self.blocks[width].state.values():
                tensor[owned] = 0

    def check_integrity(self) -> bool:
        """Every row has one owner or none, and who has rows has a place."""
        for width, block in self.blocks.items():
            owner_K = torch.full_like(block.owner_K, self._nobody)
            for number, resident in self._residents.items():
                if width in resident.trained:
                    owner_K[resident.trained[width]] = number
            if not torch.equal(owner_K, block.owner_K):
                return False
        return (
            len(self._residents) <= self.max_resident
            and self._places.is_whole(self._residents.values())
            and self.bank.check_integrity()
        )

    # What layers read, and what was trained.

    def _derive_again(self, number: int) -> None:
        """Work out derived rows for whoever is here now, in the projections where this adapter has any."""
        for path, layout in self._layouts[number].items():
            if layout.has_scale and layout.num_add:
                self._derive_magnitudes(path)
            elif layout.has_bias:
                self._derive_biases(path)
        self.refresh()

    def _derive_magnitudes(self, path: str) -> None:
        if path not in self._magnitudes:
            self._magnitudes[path] = ProjectionMagnitudes(
                self._layers.layers[path].base,
                self.blocks[self._places.width(path, "in")],
                self.blocks[self._places.width(path, "out")],
                zeros=(
                    self._places.rows(path, "in", (NULL_PAGE,))[0],
                    self._places.rows(path, "out", (NULL_PAGE,))[0],
                ),
            )
        self._magnitudes[path].hold(
            [one.magnitudes[path] for one in self._residents.values() if path in one.magnitudes]
        )

    def _derive_biases(self, path: str) -> None:
        places = [
            self._places.rows(path, "out", (own.scale, own.bias))
            for resident in self._residents.values()
            for own in (resident.pages[path],)
            if own.layout.has_bias
        ]
        self._biases.pop(path, None)
        if places:
            block = self.blocks[self._places.width(path, "out")]
            self._biases[path] = ScaledBiases(self._layers.biases[path], block, places)

    @property
    def _derived(self) -> Iterable[DerivedRows]:
        yield from self._magnitudes.values()
        yield from self._biases.values()

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

    # One adapter, as long as it has a place.

    def rows_of(self, number: int) -> AdapterRows:
        """One adapter as it is now, copied to the host."""
        resident = self._residents[number]
        return AdapterRows(
            {
                path: self._module_rows(resident, path, layout)
                for path, layout in self._layouts[number].items()
            }
        )

    def _module_rows(self, resident: Place, path: str, layout: ModuleLayout) -> ModuleRows:
        module, pages = self.bank.modules[path], resident.pages[path]
        if layout.num_mul:
            mul_b_RI = _copied(module.in_rows_NI, pages.mul_in)
            if not layout.has_a:
                return ModuleRows(mul_b_RI=mul_b_RI)
            mul_a_RO = _copied(module.out_rows_NO, pages.mul_out)
            return ModuleRows(mul_b_RI=mul_b_RI, mul_a_RO=mul_a_RO, offset=layout.offset)
        if not layout.num_add:
            scale_O = _copied(module.out_rows_NO, (pages.scale,))[0] + 1
            return ModuleRows(scale_O=scale_O, bias_scale_O=scale_O)
        add_p_EI = _copied(module.in_rows_NI, pages.add_in)
        place = resident.magnitudes.get(path)
        if place is None:
            add_q_EO = _copied(module.out_rows_NO, pages.add_out)
            return ModuleRows(add_p_EI=add_p_EI, add_q_EO=add_q_EO, add_gate=layout.add_gate)
        trained_KO = self.blocks[self._places.width(path, "out")].weight_KW
        length_O = self._magnitudes[path].length_O
        return ModuleRows(
            add_p_EI=add_p_EI,
            add_q_EO=_copied(trained_KO, place.q),
            add_gate=layout.add_gate,
            magnitude_O=(length_O + trained_KO[place.magnitude]).cpu(),
        )

    def weights_of(self, number: int) -> Weights:
        """What `put_weights` takes: one adapter's rows as they are now, copied to the host."""
        return {
            str(width): self.blocks[width].weight_KW[trained].cpu()
            for width, trained in self._residents[number].trained.items()
        }

    def put_weights(self, number: int, weights: Weights) -> None:
        """Give an adapter the rows it had once; AdamW's moments stay."""
        for width, trained in self._residents[number].trained.items():
            block = self.blocks[width].weight_KW
            block[trained] = weights[str(width)].to(block.device, block.dtype)
        self.refresh()

    def state_of(self, number: int) -> State:
        """What `restore` takes, in a trainer with any other adapters beside this one."""
        return {
            str(width): {
                name: tensor[trained].cpu() for name, tensor in self.blocks[width].state.items()
            }
            for width, trained in self._residents[number].trained.items()
        }

    def restore(self, number: int, state: State) -> None:
        """Raises KeyError or RuntimeError if the state is of an adapter of another shape."""
        for width, trained in self._residents[number].trained.items():
            for name, tensor in self.blocks[width].state.items():
                tensor[trained] = state[str(width)][name].to(tensor.device, tensor.dtype)
        self.refresh()


def _version(number: int) -> AdapterVersion:
    """A version is a digest of finished rows; in this bank an adapter goes by its number."""
    return AdapterVersion(str(number))


def _copied(rows_NW: Tensor, pages: tuple[int, ...]) -> Tensor:
    return rows_NW.detach()[torch.tensor(pages, device=rows_NW.device)].cpu()
