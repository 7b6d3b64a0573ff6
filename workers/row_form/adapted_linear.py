"""The module that takes a linear layer's place in a model, and what all of them share during a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from workers.bank.bank import AdapterBank, BankSnapshot
from workers.bank.groups import GroupTable
from workers.bank.module_bank import ModuleBank
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import BaseLinear
from workers.row_form.cost import CostModel
from workers.row_form.module_index import index_module_group
from workers.row_form.step_plan import StepPlan

Product = Callable[[Tensor, BaseLinear, Tensor, Tensor, Any], Tensor]
"""`adapted_product`, or what computes the same faster on one kind of device, without gradients. The last argument is
what the `LookUp` that belongs to it made."""


class StepIndex(Protocol):
    """What a layer asks of its index itself; the rest is between look-up and product."""

    @property
    def has_mul_rows(self) -> bool: ...
    @property
    def is_plain(self) -> bool: ...


LookUp = Callable[[StepPlan, GroupTable, CostModel], StepIndex]
"""`index_module_group`, or its counterpart for another product."""


class StepContext:
    """The step all adapted layers of a model are in. One thread at a time, like the model itself."""

    def __init__(
        self,
        cost: CostModel,
        product: Product = adapted_product,
        look_up: LookUp = index_module_group,
    ) -> None:
        self._cost = cost
        self._look_up = look_up
        self.product = product
        self._plan: StepPlan | None = None
        self._snapshot: BankSnapshot | None = None
        self._indices: dict[GroupTable, StepIndex] = {}  # of what `_indexed` says
        self._indexed: tuple[StepPlan, BankSnapshot | None] | None = None
        self._given: Mapping[str, StepIndex] | None = None
        self.step = object()

    def begin(self, plan: StepPlan | None, snapshot: BankSnapshot | None) -> None:
        """Enter a step. None, or a plan with no adapters: every layer is the plain base layer."""
        self._given = None
        self.step = object()
        if plan is None or plan.is_base_only:
            self._plan = self._snapshot = None
            return
        # While the same sequences decode and nothing is loaded, step after step has the same index.
        if not self._is_as_before(plan, snapshot):
            self._indices = {}
            self._indexed = (plan, snapshot)
        self._plan, self._snapshot = plan, snapshot

    def forget(self) -> None:
        """End the step, and keep nothing of any before."""
        self.begin(None, None)
        self._indices, self._indexed = {}, None

    def use_cost(self, cost: CostModel) -> None:
        """From the next step on, whose index is made anew though it be like the last one."""
        self.forget()
        self._cost = cost

    def begin_given(self, indices: Mapping[str, StepIndex]) -> None:
        """Enter a step whose indices by path are made already."""
        self._given = indices

    def _is_as_before(self, plan: StepPlan, snapshot: BankSnapshot | None) -> bool:
        if self._indexed is None:
            return False
        before, before_snapshot = self._indexed
        return (
            before_snapshot is snapshot
            and before.runs == plan.runs
            and before.num_tokens == plan.num_tokens
            and before.device == plan.device
        )

    def index_of(self, path: str) -> StepIndex | None:
        """The projection's index for this step, made by the first layer of its group; None in a plain step."""
        if self._given is not None:
            return self._given[path]
        if self._plan is None:
            return None
        if self._snapshot is None:
            raise RuntimeError("a step with adapters needs a bank")
        table = self._snapshot.table_of[path]
        index = self._indices.get(table)
        if index is None:
            index = self._look_up(self._plan, table, self._cost)
            self._indices[table] = index
        return index


class AdaptedLinear(nn.Module):
    """A frozen linear layer whose tokens may each use another adapter.

    Input and output are as of the layer it replaces: any leading shape, whose flattening is the plan's token order.
    """

    def __init__(self, path: str, base: BaseLinear, context: StepContext) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.rows: ModuleBank | None = None
        self._context = context

    @property
    def weight(self) -> Tensor:
        """The base weight, for models that look at their layers' weights (their dtype, mostly)."""
        return self.base.dequantised_slice(slice(None), slice(None))

    @property
    def index(self) -> StepIndex | None:
        """What adapters do to this layer in this step; None where they do nothing."""
        index = self._context.index_of(self.path)
        return None if index is None or index.is_plain else index

    def forward(self, x: Tensor) -> Tensor:
        index = self.index
        if index is None or self.rows is None:
            y = self.base.matmul(x)
            return y if self.base.bias_O is None else y + self.base.bias_O
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = self._context.product(
            x_TI, self.base, self.rows.in_rows_NI, self.rows.out_rows_NO, index
        )
        # Asked first: a conversion to the same type costs as much as a small layer's loops.
        if y_TO.dtype != x.dtype:
            y_TO = y_TO.to(x.dtype)
        return y_TO if x.dim() == 2 else y_TO.view(*x.shape[:-1], -1)


class AdapterLayers:
    """All adapted layers of one model: bound to a bank once, told of every step before it runs."""

    def __init__(self, layers: dict[str, AdaptedLinear], context: StepContext) -> None:
        self.layers = layers
        self._context = context
        self._bank: AdapterBank | None = None

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Logical projection path → (in, out) features."""
        return {
            path: (layer.base.in_features, layer.base.out_features)
            for path, layer in self.layers.items()
        }

    @property
    def biases(self) -> dict[str, Tensor]:
        """Base biases by projection, where there is one."""
        return {
            path: layer.base.bias_O
            for path, layer in self.layers.items()
            if layer.base.bias_O is not None
        }

    def base_weight(self, path: str) -> Tensor:
        """A projection's base weight_OI; may be a view: do not write to it."""
        return self.layers[path].base.dequantised_slice(slice(None), slice(None))

    def use_cost(self, cost: CostModel) -> None:
        """Choose between row mode and weight mode by this from the next step on."""
        self._context.use_cost(cost)

    def bind(self, bank: AdapterBank) -> None:
        """Use this bank from the next step on."""
        self._bank = bank
        for path, layer in self.layers.items():
            layer.rows = bank.modules[path]

    def unbind(self) -> None:
        """Hold on to no bank, so that its memory is free once nobody else does."""
        self._bank = None
        self._context.forget()
        for layer in self.layers.values():
            layer.rows = None

    @property
    def step(self) -> object:
        """Another object from step to step."""
        return self._context.step

    @property
    def snapshot(self) -> BankSnapshot | None:
        """The bank's, as a step that begins now would see it; None before `bind`."""
        return None if self._bank is None else self._bank.snapshot

    def begin_step_given(self, indices: Mapping[str, StepIndex]) -> None:
        """`begin_step` for who looked every path's index up already."""
        self._context.begin_given(indices)

    def begin_step(self, plan: StepPlan | None) -> None:
        """Call before every forward. The plan's slots stay acquired until the forward (and backward) is over."""
        has_adapters = plan is not None and not plan.is_base_only
        # Only then: to look at the bank is to wait, on the device, for what was loaded into it.
        self._context.begin(plan, self.snapshot if has_adapters else None)
