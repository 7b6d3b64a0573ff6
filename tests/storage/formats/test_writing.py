"""What is written here loads in PEFT, means the same there, and reads back exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.adapter_directory import read_directory
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError
from storage.formats import flora
from storage.formats.peft import read_peft
from storage.formats.tensors import read_tensors, write_tensors
from storage.formats.writing import write_flora, write_lora
from tests.storage.peft_adapters import (
    adapted_weight,
    linear_weights,
    loaded,
    merged_weights,
    relative_error,
    tiny_llama,
)

_Q0, _UP0, _UP1 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
)
_SHAPES = {_Q0: (32, 24), _UP0: (32, 40), _UP1: (32, 40)}  # (in, out)


def _flora(
    ranks: dict[str, int], offset: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> AdapterRows:
    torch.manual_seed(seed)
    modules = {}
    for path, rank in ranks.items():
        num_in, num_out = _SHAPES[path]
        modules[path] = ModuleRows(
            mul_b_RI=torch.randn(rank, num_in).to(dtype),
            mul_a_RO=torch.randn(rank, num_out).to(dtype),
            offset=offset,
        )
    return AdapterRows(modules)


def _lora(gates: dict[str, tuple[int, float]], dtype: torch.dtype = torch.float64) -> AdapterRows:
    torch.manual_seed(0)
    modules = {}
    for path, (rank, gate) in gates.items():
        num_in, num_out = _SHAPES[path]
        modules[path] = ModuleRows(
            add_p_EI=torch.randn(rank, num_in).to(dtype),
            add_q_EO=torch.randn(rank, num_out).to(dtype),
            add_gate=gate,
        )
    return AdapterRows(modules)


def _assert_same(found: AdapterRows, expected: AdapterRows) -> None:
    assert set(found.modules) == set(expected.modules)
    assert found.base_digest == expected.base_digest
    for path, rows in expected.modules.items():
        other = found.modules[path]
        assert (other.offset, other.add_gate) == (rows.offset, rows.add_gate)
        assert set(other.tensors()) == set(rows.tensors())
        for name, tensor in rows.tensors().items():
            assert other.tensors()[name].dtype == tensor.dtype
            assert torch.equal(other.tensors()[name], tensor), (path, name)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("ranks", [{_Q0: 2, _UP0: 2, _UP1: 2}, {_Q0: 1, _UP0: 4, _UP1: 2}])
def test_flora_means_the_same_in_peft(offset: int, ranks: dict[str, int], tmp_path: Path) -> None:
    rows = _flora(ranks, offset)
    base = linear_weights(tiny_llama())
    merged = merged_weights(loaded(write_flora(rows, "base"), tmp_path / "adapter"))
    for path, weight in base.items():
        if path not in ranks:
            assert torch.equal(merged[path], weight)
            continue
        ours = adapted_weight(weight, rows.modules[path])
        assert relative_error(merged[path], ours, weight) < 1e-12
        # The twin: the neighbour's rows are far off.
        if path in (_UP0, _UP1):
            other = rows.modules[_UP1 if path == _UP0 else _UP0]
            assert relative_error(merged[path], adapted_weight(weight, other), weight) > 0.5


def test_lora_means_the_same_in_peft(tmp_path: Path) -> None:
    rows = _lora({_Q0: (2, 1.5), _UP0: (4, 0.25), _UP1: (2, 1.5)})
    base = linear_weights(tiny_llama())
    merged = merged_weights(loaded(write_lora(rows, "base"), tmp_path / "adapter"))
    for path, weight in base.items():
        if path not in rows.modules:
            assert torch.equal(merged[path], weight)
            continue
        ours = adapted_weight(weight, rows.modules[path])
        assert relative_error(merged[path], ours, weight) < 1e-12


@given(
    ranks=st.dictionaries(st.sampled_from(sorted(_SHAPES)), st.integers(1, 6), min_size=1),
    offset=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    digest=st.sampled_from([None, "ab" * 32]),
)
@settings(max_examples=60, deadline=None)
def test_flora_reads_back_exactly(
    ranks: dict[str, int], offset: int, dtype: torch.dtype, digest: str | None
) -> None:
    rows = replace(_flora(ranks, offset, dtype), base_digest=digest)
    adapter = read_peft(write_flora(rows, "base"))
    assert adapter.family == "flora"
    _assert_same(adapter.rows, rows)


@given(
    gates=st.dictionaries(
        st.sampled_from(sorted(_SHAPES)),
        st.tuples(st.integers(1, 64), st.floats(1e-6, 100)),
        min_size=1,
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_lora_reads_back_exactly(gates: dict[str, tuple[int, float]], dtype: torch.dtype) -> None:
    rows = _lora(gates, dtype)
    adapter = read_peft(write_lora(rows, "base"))
    assert adapter.family == "lora"
    for path, (_, gate) in gates.items():
        assert adapter.rows.modules[path].add_gate == pytest.approx(gate, rel=1e-15)
    exact = {
        path: replace(module, add_gate=adapter.rows.modules[path].add_gate)
        for path, module in rows.modules.items()
    }
    _assert_same(adapter.rows, AdapterRows(exact))


@pytest.mark.parametrize("alpha", [1, 7, 16, 49, 0.5])
@pytest.mark.parametrize("rank", [1, 3, 7, 16, 49])
def test_an_alpha_over_the_rank_survives_the_round_trip(alpha: float, rank: int) -> None:
    rows = _lora({_Q0: (rank, alpha / rank)})
    files = write_lora(rows, "base")
    assert json.loads(files["adapter_config.json"])["lora_alpha"] == alpha
    _assert_same(read_peft(files).rows, rows)


def test_a_module_without_effect_is_left_out() -> None:
    rows = _flora({_Q0: 2}, 1)
    empty = ModuleRows(mul_b_RI=torch.zeros(0, 32), mul_a_RO=torch.zeros(0, 40))
    wider = AdapterRows({**rows.modules, _UP0: empty})
    _assert_same(read_peft(write_flora(wider, "base")).rows, rows)


def test_offset_0_with_no_rows_in_a_module_switches_it_off(tmp_path: Path) -> None:
    empty = ModuleRows(mul_b_RI=torch.zeros(0, 32), mul_a_RO=torch.zeros(0, 40), offset=0)
    rows = AdapterRows({**_flora({_Q0: 2}, 0, torch.float32).modules, _UP0: empty})
    files = write_flora(rows, "base")
    _assert_same(read_peft(files).rows, rows)
    merged = merged_weights(loaded(files, tmp_path / "adapter"))
    assert not merged[_UP0].any()


def test_the_same_rows_are_the_same_bytes_every_time() -> None:
    """Else a retry would publish another version. The safetensors package orders metadata at random."""
    rows = replace(_flora({_Q0: 1, _UP0: 2, _UP1: 3}, 0), base_digest="ab" * 32)
    written = {
        tuple(sorted(write_flora(replace(rows, modules=dict(modules)), "base").items()))
        for modules in permutations(rows.modules.items())
    }
    assert len(written) == 1


def test_the_order_and_strides_of_tensors_do_not_change_the_bytes() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 4), torch.randn(5).to(torch.bfloat16)
    plain = write_tensors({"x": first, "y": second}, {"b": "1", "a": "2"})
    other = write_tensors({"y": second, "x": first.T.contiguous().T}, {"a": "2", "b": "1"})
    assert plain == other
    tensors, metadata = read_tensors("file", plain)
    assert torch.equal(tensors["x"], first) and torch.equal(tensors["y"], second)
    assert metadata == {"a": "2", "b": "1"}


@pytest.mark.parametrize(
    "rows",
    [
        AdapterRows({}),
        AdapterRows({_Q0: ModuleRows()}),
        AdapterRows({**_flora({_Q0: 2}, 0).modules, **_flora({_UP0: 2}, 1).modules}),
        _lora({_Q0: (2, 1.0)}),
        AdapterRows({_Q0: ModuleRows(mul_a_RO=torch.ones(1, 24), offset=0)}),
        AdapterRows(
            {_Q0: replace(_flora({_Q0: 2}, 1).modules[_Q0], scale_O=torch.ones(24))},
        ),
    ],
)
def test_rows_that_are_not_floras_are_not_written_as_such(rows: AdapterRows) -> None:
    with pytest.raises(ValueError):
        write_flora(rows, "base")


@pytest.mark.parametrize("rows", [AdapterRows({}), _flora({_Q0: 2}, 1), _flora({_Q0: 2}, 0)])
def test_rows_that_are_not_loras_are_not_written_as_such(rows: AdapterRows) -> None:
    with pytest.raises(ValueError):
        write_lora(rows, "base")


@pytest.mark.parametrize(
    "change",
    [
        {flora.OFFSET: "2"},
        {flora.OFFSET: "1"},  # the file has offset 0 and its extra component
        {flora.RANKS: "{}"},
        {flora.RANKS: "not JSON"},
        {flora.RANKS: json.dumps({_Q0: 3, _UP0: 4})},  # more rows than were written
        {flora.RANKS: json.dumps({_Q0: 1, _UP0: 4})},  # a real row taken for an added one
        {flora.RANKS: json.dumps({_Q0: -2, _UP0: 4})},
        {flora.RANKS: json.dumps({_Q0: 2.0, _UP0: 4})},
    ],
)
def test_metadata_that_contradicts_the_tensors_is_refused(change: dict[str, str]) -> None:
    files = write_flora(_flora({_Q0: 2, _UP0: 4}, 0), "base")
    tensors, metadata = read_tensors("file", files["adapter_model.safetensors"])
    files["adapter_model.safetensors"] = write_tensors(tensors, metadata | change)
    with pytest.raises(AdapterRefusedError, match=r"q_proj|up_proj"):
        read_peft(files)


def test_a_flora_adapter_that_peft_saved_again_is_still_the_same_function(tmp_path: Path) -> None:
    """PEFT drops our metadata; what is left is an ordinary HiRA adapter of one rank more."""
    rows = _flora({_Q0: 1, _UP0: 3}, 0)
    loaded(write_flora(rows, "base"), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = read_peft(read_directory(tmp_path / "theirs"))
    assert again.family == "hira"
    base = linear_weights(tiny_llama())
    for path, module in rows.modules.items():
        found = adapted_weight(base[path], again.rows.modules[path])
        assert relative_error(found, adapted_weight(base[path], module), base[path]) < 1e-12
