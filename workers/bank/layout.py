"""How many pages an adapter takes in a module, and where it found them."""

from __future__ import annotations

from dataclasses import dataclass

from storage.adapter_rows import ModuleRows
from workers.bank.pages import NULL_PAGE, ONES_PAGE, PageAllocator


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """The shape of one adapter in one module; modules where it is the same can share one index.

    The default is an adapter that does not touch the module.
    """

    num_mul: int = 0
    num_add: int = 0
    has_a: bool = True  # the output side of mul rows is stored; all ones otherwise
    has_b: bool = True
    offset: int = 1
    add_gate: float = 1.0
    has_scale: bool = False
    has_bias: bool = False

    @classmethod
    def of(cls, rows: ModuleRows | None) -> ModuleLayout:
        if rows is None:
            return cls()
        return cls(
            num_mul=rows.num_mul,
            num_add=rows.num_add,
            has_a=rows.mul_a_RO is not None or not rows.num_mul,
            has_b=rows.mul_b_RI is not None or not rows.num_mul,
            offset=rows.offset,
            add_gate=rows.add_gate,
            has_scale=rows.scale_O is not None or rows.magnitude_O is not None,
            has_bias=not (rows.bias_scale_O is rows.bias_shift_O is rows.bias_O is None),
        )

    @property
    def num_in(self) -> int:
        """Input-side pages."""
        return self.num_mul * self.has_b + self.num_add

    @property
    def num_out(self) -> int:
        """Output-side pages."""
        return self.num_mul * self.has_a + self.num_add + self.has_scale + self.has_bias


@dataclass(frozen=True, slots=True)
class SlotPages:
    """Where one adapter's rows lie in every module of a group.

    The pages `scale` and `bias` hold c − 1 and bias' − bias, so that 16 bits hold what the adapter itself adds: the
    type's step near 1 is coarser than what a young adapter does to c. NULL_PAGE where it changes nothing.
    """

    layout: ModuleLayout
    mul_in: tuple[int, ...]
    mul_out: tuple[int, ...]
    add_in: tuple[int, ...]
    add_out: tuple[int, ...]
    scale: int
    bias: int

    @classmethod
    def allocate(cls, layout: ModuleLayout, ins: PageAllocator, outs: PageAllocator) -> SlotPages:
        mul, add = layout.num_mul, layout.num_add
        return cls(
            layout=layout,
            mul_in=ins.allocate(mul) if layout.has_b else (ONES_PAGE,) * mul,
            mul_out=outs.allocate(mul) if layout.has_a else (ONES_PAGE,) * mul,
            add_in=ins.allocate(add),
            add_out=outs.allocate(add),
            scale=outs.allocate(1)[0] if layout.has_scale else NULL_PAGE,
            bias=outs.allocate(1)[0] if layout.has_bias else NULL_PAGE,
        )

    @property
    def in_pages(self) -> tuple[int, ...]:
        """The input-side pages this adapter owns."""
        return (*(self.mul_in if self.layout.has_b else ()), *self.add_in)

    @property
    def out_pages(self) -> tuple[int, ...]:
        """The output-side pages this adapter owns."""
        single = (self.scale,) * self.layout.has_scale + (self.bias,) * self.layout.has_bias
        return (*(self.mul_out if self.layout.has_a else ()), *self.add_out, *single)
