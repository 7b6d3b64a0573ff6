"""What every adapter becomes once it is read: rows, per linear projection. The device knows nothing else.

    y = c ∘ [ offset · x W0ᵀ + Σ_mul a_j ∘ ((b_j ∘ x) W0ᵀ) ] + Σ_add g_e · (x · p_e) q_e + bias'

Shape legend: I input features, O output features, R mul rows, E add rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModuleRows:
    """One adapter's effect on one logical projection.

    A side of a mul row that is all ones (IA3) is not stored: `mul_a_RO` or `mul_b_RI` is None then.
    bias' is `bias_O` where there is one, else `bias_scale ∘ bias + bias_shift`; None where it changes nothing.

    DoRA's c depends on the base, so its rows are given by `magnitude_O` until a bank measures W0:
    c = m / ‖W0 + g Σ q pᵀ‖, norms of rows, and the add rows are scaled by c too.
    """

    mul_a_RO: Tensor | None = None  # output side
    mul_b_RI: Tensor | None = None  # input side
    add_q_EO: Tensor | None = None  # output side
    add_p_EI: Tensor | None = None  # input side
    add_gate: float = 1.0  # alpha/r or alpha/√r
    offset: int = 1  # 0 or 1: how many times the base product itself enters
    scale_O: Tensor | None = None  # c
    magnitude_O: Tensor | None = None  # m
    bias_scale_O: Tensor | None = None
    bias_shift_O: Tensor | None = None
    bias_O: Tensor | None = None

    def __post_init__(self) -> None:
        if self.offset not in (0, 1):
            raise ValueError(f"offset is 0 or 1, not {self.offset}")
        if (self.add_q_EO is None) != (self.add_p_EI is None):
            raise ValueError("add rows need both sides")
        for left, right in ((self.mul_a_RO, self.mul_b_RI), (self.add_q_EO, self.add_p_EI)):
            if left is not None and right is not None and left.shape[0] != right.shape[0]:
                raise ValueError(f"{left.shape[0]} output rows against {right.shape[0]} input rows")
        if self.bias_O is not None and not (self.bias_scale_O is self.bias_shift_O is None):
            raise ValueError("a bias that replaces the base's is neither scaled nor shifted")
        if self.magnitude_O is not None and (
            self.num_mul or not self.offset or self.scale_O is not None
        ):
            raise ValueError("a magnitude goes with add rows only")

    @property
    def num_mul(self) -> int:
        side = self.mul_a_RO if self.mul_a_RO is not None else self.mul_b_RI
        return 0 if side is None else side.shape[0]

    @property
    def num_add(self) -> int:
        return 0 if self.add_q_EO is None else self.add_q_EO.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of both kinds; one where there is only a scale or a bias."""
        return self.num_mul + self.num_add or int(bool(self.tensors()))

    @property
    def num_pages(self) -> int:
        """Pages it takes in a bank, on the side that takes more: its stored rows, a scale's page and a bias's."""
        has_scale = self.scale_O is not None or self.magnitude_O is not None
        has_bias = not (self.bias_scale_O is self.bias_shift_O is self.bias_O is None)
        num_in = self.num_mul * (self.mul_b_RI is not None) + self.num_add
        num_out = self.num_mul * (self.mul_a_RO is not None) + self.num_add + has_scale + has_bias
        return max(num_in, num_out)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        named = {
            "mul_a_RO": self.mul_a_RO,
            "mul_b_RI": self.mul_b_RI,
            "add_q_EO": self.add_q_EO,
            "add_p_EI": self.add_p_EI,
            "scale_O": self.scale_O,
            "magnitude_O": self.magnitude_O,
            "bias_scale_O": self.bias_scale_O,
            "bias_shift_O": self.bias_shift_O,
            "bias_O": self.bias_O,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def needs_its_base(self) -> bool:
        """The rows multiply or measure W0: on another base of the same shapes they would mean something else."""
        return self.magnitude_O is not None or (
            self.mul_a_RO is not None and self.mul_b_RI is not None
        )

    @property
    def num_bytes(self) -> int:
        """A tensor with two meanings (IA3's vector) counts once."""
        return sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors().values()}.values()
        )


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """One adapter: its effect on each logical projection it touches, by the projection's full module path.

    `base_digest` is the base model it was made for; None when it does not depend on the base's values and
    the file did not say.
    """

    modules: Mapping[str, ModuleRows] = field(default_factory=dict)
    base_digest: str | None = None

    @property
    def needs_its_base(self) -> bool:
        return any(rows.needs_its_base for rows in self.modules.values())

    @property
    def max_rank(self) -> int:
        """The most rows in any one projection."""
        return max((rows.num_rows for rows in self.modules.values()), default=0)

    @property
    def max_pages(self) -> int:
        """The most bank pages it takes in any one projection."""
        return max((rows.num_pages for rows in self.modules.values()), default=0)

    @property
    def num_bytes(self) -> int:
        return sum(rows.num_bytes for rows in self.modules.values())
