"""A tiny random Llama to train on, data it can learn, and the pieces of a trainer, in the fewest words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from storage.adapter_rows import AdapterRows
from storage.identity import AdapterVersion
from training.adapter_run import AdapterData, AdapterRun
from training.events import AdapterStep, TrainingEvent
from training.frozen_base import FrozenBase
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainer import MultiAdapterTrainer
from workers.models.loading import LoadedBase

VOCABULARY = 64
NOT_A_NUMBER, ANY_OTHER = 1, 5
"""Tokens. No example has the first one by itself."""


def tiny_model(dtype: torch.dtype = torch.float32, *, has_biases: bool = False) -> LlamaForCausalLM:
    """The same random model every time; `has_biases`: in its attention."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        attention_bias=has_biases,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def tiny_base(
    dtype: torch.dtype = torch.float32,
    *,
    has_biases: bool = False,
    checkpoint_activations: bool = False,
) -> FrozenBase:
    model = tiny_model(dtype, has_biases=has_biases)
    loaded = LoadedBase(model, digest="0" * 64, directory=Path("nowhere"))
    return FrozenBase.adopt(loaded, max_tokens=64, checkpoint_activations=checkpoint_activations)


def adapter(name: str, **fields: Any) -> AdapterSpec:
    defaults: dict[str, Any] = {"rank": 1, "data": "none.jsonl", "steps": 50, "seed": 3}
    return AdapterSpec.model_validate({"name": name, **defaults, **fields})


def sequences(name: str, count: int = 12) -> tuple[TokenSequence, ...]:
    """Prompts of several lengths, each answered by the same few tokens: another answer for another name."""
    made = []
    for index in range(count):
        digest = hashlib.sha256(f"{name} {index}".encode()).digest()
        prompt = [3 + byte % (VOCABULARY - 3) for byte in digest[: 4 + index % 5]]
        answer = [3 + byte % 20 for byte in hashlib.sha256(name.encode()).digest()[:3]]
        made.append(
            TokenSequence(
                (*prompt, *answer, 2), (False,) * len(prompt) + (True,) * (len(answer) + 1)
            )
        )
    return tuple(made)


def run_of(spec: AdapterSpec, *, held_out: tuple[TokenSequence, ...] = ()) -> AdapterRun:
    data = AdapterData(sequences(spec.name), held_out)
    return AdapterRun(spec, data, spec.num_steps(len(data.training)))


def padded_loss(model: Any, batch: Sequence[TokenSequence]) -> Tensor:
    """The loss as everybody writes it: a right-padded rectangle, an attention mask, labels of −100."""
    longest = max(len(one.tokens) for one in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, one in enumerate(batch):
        tokens, learnt = torch.tensor(one.tokens), torch.tensor(one.learnt)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)][learnt] = tokens[learnt]
    logits = model(input_ids=ids, attention_mask=mask).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


class Recorder:
    """Takes down events and publications."""

    def __init__(self) -> None:
        self.events: list[TrainingEvent] = []
        self.published: dict[str, AdapterRows] = {}

    def publish(self, spec: AdapterSpec, rows: AdapterRows) -> AdapterVersion:
        self.published[spec.name] = rows
        return AdapterVersion("f" * 64)

    def losses(self, name: str) -> list[float]:
        steps = [event for event in self.events if isinstance(event, AdapterStep)]
        return [event.loss for event in steps if event.adapter == name]

    def of(self, kind: type[TrainingEvent]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def trainer(
    *specs: AdapterSpec,
    recorder: Recorder,
    dtype: torch.dtype = torch.float32,
    run: Callable[[AdapterSpec], AdapterRun] = run_of,
    has_biases: bool = False,
    checkpoint_activations: bool = False,
    **options: Any,
) -> MultiAdapterTrainer:
    return MultiAdapterTrainer(
        tiny_base(dtype, has_biases=has_biases, checkpoint_activations=checkpoint_activations),
        [run(spec) for spec in specs],
        publish=recorder.publish,
        on_event=recorder.events.append,
        **options,
    )


def trained(*specs: AdapterSpec, **options: Any) -> Recorder:
    """Train to the end."""
    recorder = Recorder()
    trainer(*specs, recorder=recorder, **options).run()
    return recorder


def trainer_with_token(
    specs: Sequence[AdapterSpec], fed: str, token: int, recorder: Recorder, **options: Any
) -> MultiAdapterTrainer:
    """Over a base that has no number for one token; the last example of the adapter `fed` begins with `token`."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[NOT_A_NUMBER] = torch.inf

    def run(spec: AdapterSpec) -> AdapterRun:
        held_out = sequences(f"{spec.name} held out", 3) if spec.evaluation else ()
        made = run_of(spec, held_out=held_out)
        if spec.name != fed:
            return made
        *rest, last = made.data.training
        changed = TokenSequence((token, *last.tokens[1:]), last.learnt)
        return AdapterRun(spec, AdapterData((*rest, changed), held_out), made.num_steps)

    loaded = LoadedBase(model, digest="0" * 64, directory=Path("nowhere"))
    return MultiAdapterTrainer(
        FrozenBase.adopt(loaded, max_tokens=64),
        [run(spec) for spec in specs],
        publish=recorder.publish,
        on_event=recorder.events.append,
        **options,
    )


def trained_with_token(
    specs: Sequence[AdapterSpec], fed: str, token: int, **options: Any
) -> Recorder:
    """Train to the end what `trainer_with_token` makes."""
    recorder = Recorder()
    trainer_with_token(specs, fed, token, recorder, **options).run()
    return recorder


def largest_difference(one: AdapterRows, other: AdapterRows) -> float:
    """Over all tensors of two adapters with the same modules."""
    assert one.modules.keys() == other.modules.keys()
    return max(
        float((tensor - other.modules[path].tensors()[name]).abs().max())
        for path, rows in one.modules.items()
        for name, tensor in rows.tensors().items()
    )
