"""Against others' arithmetic: PEFT trained by a plain loop, and autograd with each adapter's weights written out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from tests.training.tiny_jobs import (
    Recorder,
    adapter,
    padded_loss,
    run_of,
    sequences,
    tiny_model,
    trained,
    trainer,
)
from training.example_stream import ExampleStream
from training.initial_rows import initial_rows
from training.spec import AdapterSpec

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft_loop(
    spec: AdapterSpec, dtype: torch.dtype
) -> tuple[list[float], dict[str, dict[str, Tensor]]]:
    """Train one adapter with PEFT, torch's AdamW and torch's clipping, from the same start on the same batches."""
    base = tiny_model(dtype, has_biases=spec.family == "ia3")
    shapes = {
        path: (module.in_features, module.out_features)
        for path, module in base.named_modules()
        if path.endswith(TARGETS)
    }
    start = initial_rows(spec, shapes, dtype)
    model = get_peft_model(base, peft_config(spec))
    parameters = {
        path: _peft_parameters(model.base_model.model.get_submodule(path)) for path in start.modules
    }
    with torch.no_grad():
        for path, rows in start.modules.items():
            for name, tensor in rows.tensors().items():
                if name in ("mul_b_RI", "add_p_EI") and spec.family != "ia3":
                    parameters[path][name].copy_(tensor)

    trainable = [one for one in model.parameters() if one.requires_grad]
    assert len(trainable) == sum(map(len, parameters.values()))
    assert spec.learning_rate is not None and spec.seed is not None and spec.steps is not None
    optimizer = torch.optim.AdamW(trainable, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    data = sequences(spec.name)
    stream = ExampleStream(len(data), spec.seed)
    losses = []
    for _ in range(spec.steps):
        optimizer.zero_grad()
        loss = padded_loss(model, [data[index] for index in stream.draw(spec.batch_size)])
        loss.backward()
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trainable, spec.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {
        path: {name: parameter.detach() for name, parameter in of_module.items()}
        for path, of_module in parameters.items()
    }


def peft_config(spec: AdapterSpec) -> Any:
    targets = list(TARGETS)
    if spec.family == "flora":
        return HiraConfig(r=spec.rank, target_modules=targets)
    if spec.family == "ia3":
        return IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.family == "rslora",
        use_dora=spec.family == "dora",
        target_modules=targets,
    )


PARTS = {
    "hira_A": "mul_b_RI",
    "hira_B": "mul_a_RO",
    "lora_A": "add_p_EI",
    "lora_B": "add_q_EO",
    "lora_magnitude_vector": "magnitude_O",
    "ia3_l": "ia3_l",
}


def _peft_parameters(layer: Any) -> dict[str, Tensor]:
    """A layer's trained parameters, by the names that they have here."""
    found = {}
    for part, name in PARTS.items():
        if "default" in getattr(layer, part, ()):
            parameter = getattr(layer, part)["default"]
            found[name] = getattr(parameter, "weight", parameter)
    return found


def as_peft_trains(rows: AdapterRows, path: str) -> dict[str, Tensor]:
    """One module's rows as PEFT's parameters, by the same names as `_peft_parameters`."""
    module = rows.modules[path]
    if module.scale_O is not None:
        return {"ia3_l": module.scale_O[:, None]}
    tensors = module.tensors()
    if tensors.keys() == {"mul_b_RI"}:
        return {"ia3_l": tensors["mul_b_RI"] + 1}
    return {
        name: tensor.T if name in ("mul_a_RO", "add_q_EO") else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (
            adapter(
                "hira", rank=3, clip_norm=0.5, weight_decay=0.02, learning_rate=1.2e-2, steps=60
            ),
            torch.float32,
        ),
        (
            adapter("lora", family="lora", rank=4, alpha=6, learning_rate=4e-3, clip_norm=None),
            torch.float32,
        ),
        (adapter("rslora", family="rslora", rank=4, alpha=4, learning_rate=2e-3), torch.float32),
        # PEFT's norm is another sum, and Adam makes a step of whatever rounding leaves of a zero.
        (
            adapter("dora", family="dora", rank=3, alpha=6, learning_rate=4e-3, clip_norm=0.5),
            torch.float64,
        ),
        (adapter("ia3", family="ia3", learning_rate=3e-2, clip_norm=0.5), torch.float32),
    ],
    ids=["hira", "lora", "rslora", "dora", "ia3"],
)
def test_training_here_equals_peft_in_a_plain_loop(spec: AdapterSpec, dtype: torch.dtype) -> None:
    neighbours = [
        adapter("neighbour", rank=5, steps=20),
        adapter("magnitude", family="dora", rank=5, steps=20, learning_rate=1e-2),
    ]
    # IA3 scales biases too.
    ours = trained(*neighbours, spec, dtype=dtype, has_biases=spec.family == "ia3")
    losses, parameters = peft_loop(spec, dtype)
    assert losses[-1] <= 0.8 * losses[0]
    pairs = zip(ours.losses(spec.name), losses, strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1e-5
    for path, of_module in parameters.items():
        mine = as_peft_trains(ours.published[spec.name], path)
        assert mine.keys() == of_module.keys()
        for name, parameter in of_module.items():
            assert (mine[name] - parameter).abs().max() <= 1e-5, (path, name)


SPECS = [
    adapter("flora", rank=3, rank_pattern={"k_proj": 5, "down_proj": 1}, steps=2),
    adapter("lora", family="lora", rank=4, alpha=6, target_modules=["q_proj", "up_proj"], steps=2),
    adapter("paper", rank=2, offset=0, steps=2, batch_size=2),
    adapter("flora-some", rank=7, target_modules=["v_proj", "o_proj"], steps=2),
]


def test_gradients_equal_autograd_through_written_out_weights() -> None:
    specs = [spec.model_copy(update={"clip_norm": None}) for spec in SPECS]
    recorder = Recorder()
    job = trainer(*specs, recorder=recorder, dtype=torch.float64)
    job.start()
    generator = torch.Generator().manual_seed(1)
    for block in job.rows.blocks.values():
        noise = torch.randn(block.weight_KW.shape, generator=generator, dtype=torch.float64)
        block.weight_KW += 0.3 * noise * (block.owner_K < len(specs))[:, None]
    before = [job.rows.rows_of(number) for number in range(len(specs))]
    job.step()

    model = tiny_model(torch.float64)
    for number, (spec, rows) in enumerate(zip(specs, before, strict=True)):
        leaves = {
            path: (_in_side(module).requires_grad_(), _out_side(module).requires_grad_())
            for path, module in rows.modules.items()
        }
        weights = {
            f"{path}.weight": _written_out(
                model.get_submodule(path).weight, rows.modules[path], *sides
            )
            for path, sides in leaves.items()
        }
        loss = padded_loss(
            lambda weights=weights, **inputs: functional_call(model, weights, (), inputs),
            run_of(spec).draw(),
        )
        loss.backward()
        assert loss.item() == pytest.approx(recorder.losses(spec.name)[0], rel=1e-12)
        for path, pages in job.rows.bank.pages_of(AdapterVersion(str(number))).items():
            bank = job.rows.bank.modules[path]
            if path not in leaves:
                assert not pages.in_pages
                continue
            for leaf, gradient, owned in (
                (leaves[path][0], bank.in_rows_NI.grad, pages.in_pages),
                (leaves[path][1], bank.out_rows_NO.grad, pages.out_pages),
            ):
                assert leaf.grad is not None and gradient is not None
                assert _relative(gradient[list(owned)], leaf.grad) < 1e-9, path


def _in_side(rows: ModuleRows) -> Tensor:
    side = rows.mul_b_RI if rows.num_mul else rows.add_p_EI
    assert side is not None
    return side


def _out_side(rows: ModuleRows) -> Tensor:
    side = rows.mul_a_RO if rows.num_mul else rows.add_q_EO
    assert side is not None
    return side


def _written_out(weight_OI: Tensor, rows: ModuleRows, in_RI: Tensor, out_RO: Tensor) -> Tensor:
    product_OI = out_RO.T @ in_RI
    if rows.num_mul:
        return weight_OI * (rows.offset + product_OI)
    return weight_OI + rows.add_gate * product_OI


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_base_model_is_where_every_family_begins() -> None:
    """The first loss is the base's own, and so is that of the same batch without any adapter."""
    specs: Iterable[AdapterSpec] = [
        adapter("flora", rank=4, steps=1),
        adapter("paper", rank=4, offset=0, steps=1),
        adapter("lora", family="lora", rank=4, steps=1),
        adapter("dora", family="dora", rank=4, steps=1),
        adapter("ia3", family="ia3", steps=1),
    ]
    job = trained(*specs)
    for spec in specs:
        expected = padded_loss(tiny_model(), run_of(spec).draw()).item()
        assert job.losses(spec.name)[0] == pytest.approx(expected, rel=1e-5)
