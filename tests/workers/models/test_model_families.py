"""Every family of models served: greedy tokens are those of transformers' own `generate`, adapters included.

The reference with an adapter is PEFT's model, or for FLoRA's own form a model whose weights were changed; no code of
ours runs in either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import read_base_facts
from storage.errors import AdapterRefusedError, InvalidRequestError
from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import (
    greedy,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from tests.workers.models.families import (
    FAMILIES,
    MAX_TOKENS,
    PEFT_KINDS,
    VOCABULARY,
    linear_shapes,
    loaded,
    peft_adapter,
    save_family,
    with_weights_of,
)
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest
from workers.models.loading import load_base
from workers.models.native.decoder import SUPPORTED

NEW_TOKENS = 8


@dataclass(frozen=True)
class Family:
    """A checkpoint, adapters on it, and who asks for what."""

    directory: Path
    runner: str
    adapters: Mapping[AdapterVersion, AdapterRows]
    requests: Mapping[str, EngineRequest]
    expected: Mapping[str, list[int]]  # by request, as the reference generates


RUNNERS = [
    (name, runner)
    for name, (model_type, _) in FAMILIES.items()
    for runner in (("hf", "native") if model_type in SUPPORTED else ("hf",))
]


@pytest.fixture(scope="module", params=RUNNERS, ids="-".join)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, runner = request.param
    folder = tmp_path_factory.mktemp("family")
    directory = save_family(name, folder / "base")
    base = loaded(directory)
    references: dict[str, PreTrainedModel] = {"base": base, "base again": base}
    adapters = {}
    for number, (kind_name, config) in enumerate(PEFT_KINDS.items()):
        references[kind_name], adapters[version(number)] = peft_adapter(
            config, directory, folder / kind_name, seed=number
        )
    flora = random_adapter(linear_shapes(base), "flora0", lambda module: 1 + module % 4, seed=5)
    adapters[version(len(PEFT_KINDS))] = flora
    references["flora"] = with_weights_of(flora, directory)
    users = [None, None, *adapters]
    requests = {
        name: greedy(name, prompt(number, 3 + 4 * number, VOCABULARY), user, NEW_TOKENS)
        for number, (name, user) in enumerate(zip(references, users, strict=True))
    }
    expected = {
        name: _generated(references[name], one.prompt_token_ids) for name, one in requests.items()
    }
    return Family(directory, runner, adapters, requests, expected)


def _generated(model: PreTrainedModel, prompt_token_ids: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt_token_ids])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(made[0, ids.shape[1] :].tolist())


def _engine(
    family: Family,
    adapters: Mapping[AdapterVersion, AdapterRows] | None = None,
    dtype: str = "float64",
) -> Engine:
    return small_engine(
        family.directory,
        family.adapters if adapters is None else adapters,
        max_sequence_tokens=MAX_TOKENS,
        max_step_tokens=16,
        runner=family.runner,
        dtype=dtype,
    )


def _answers(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in run(engine, requests).items()}


def test_the_references_differ_and_go_somewhere(family: Family) -> None:
    assert len({token for tokens in family.expected.values() for token in tokens}) > NEW_TOKENS
    assert len({tuple(tokens) for tokens in family.expected.values()}) == len(family.expected)


def test_answers_alone_and_in_a_mixed_batch_are_the_references(family: Family) -> None:
    engine = _engine(family)
    assert _answers(engine, family.requests.values()) == family.expected
    alone = {}
    for request in family.requests.values():
        alone |= _answers(engine, [request])
    assert alone == family.expected


def test_answers_in_float32_are_the_same(family: Family) -> None:
    """Where the compiled loops compute; no two best tokens are as close here as float32 rounds."""
    engine = _engine(family, dtype="float32")
    assert _answers(engine, family.requests.values()) == family.expected


def test_a_dropped_or_swapped_adapter_gives_other_answers(family: Family) -> None:
    adapted = [one for one in family.requests.values() if not one.adapters.is_base]
    names = list(family.adapters)
    swapped = {one: family.adapters[names[i - 1]] for i, one in enumerate(names)}
    for wrong_rows in (dict.fromkeys(names, AdapterRows()), swapped):
        for name, tokens in _answers(_engine(family, wrong_rows), adapted).items():
            assert tokens != family.expected[name], name


def test_the_layers_are_known_from_the_files_alone(family: Family) -> None:
    facts = read_base_facts(family.directory)
    assert facts.projections == linear_shapes(loaded(family.directory))
    assert facts.are_layers_known


@pytest.mark.parametrize("path", ["lm_head", "transformer.wte", "transformer.wpe"])
def test_an_adapter_of_the_head_or_an_embedding_is_refused(path: str, tmp_path: Path) -> None:
    directory = save_family("gpt2", tmp_path)
    adapters = {version(0): random_adapter({path: (32, VOCABULARY)}, "lora", 1, seed=0)}
    request = greedy("one", prompt(0, 5, VOCABULARY), version(0))
    answer = run(small_engine(directory, adapters), [request])["one"]
    assert isinstance(answer.error, AdapterRefusedError)
    assert repr(path) in answer.error.message


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt_bigcode", "opt", "starcoder2"])
def test_a_checkpoint_of_the_bare_decoder_is_the_same_model(name: str, tmp_path: Path) -> None:
    whole = save_family(name, tmp_path / "whole")
    bare = save_family(name, tmp_path / "bare", bare=True)
    assert read_base_facts(bare).projections == read_base_facts(whole).projections
    request = greedy("one", prompt(0, 9, VOCABULARY), max_tokens=NEW_TOKENS)
    answers = [
        run(small_engine(directory, max_sequence_tokens=MAX_TOKENS), [request])["one"].tokens
        for directory in (whole, bare)
    ]
    assert answers[0] == answers[1]


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    """transformers would put random ones in their place."""
    untied = save_family("llama", tmp_path / "bare", bare=True)
    with pytest.raises(InvalidRequestError, match=r"lacks the tensor lm_head\.weight"):
        load_base(str(untied), torch.float64, torch.device("cpu"))
