"""Names and versions: what is one, what is not, and what a request's `model` means."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import errors
from storage.errors import AmbiguousModelError, FloraError, InvalidRequestError, UnknownModelError
from storage.identity import (
    AdapterName,
    AdapterSet,
    AdapterVersion,
    ModelName,
    canonical_json,
    checked_name,
    checked_version,
    is_version,
    parse_model_id,
)
from tests.storage.versions import content_of, files_of, version_of

_BASE = "org/base:v1"
_VERSION = AdapterVersion("ab" * 32)


@pytest.mark.parametrize("name", ["a", "0", "my-adapter_v1.2", "a" * 64])
def test_a_plain_name_is_a_name(name: str) -> None:
    assert checked_name(name) == name
    AdapterName(name, name)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "_a", "a/b", "a b", "a@b", "a:b", "é", "a" * 65, "a\n"]
)
def test_anything_else_is_refused_by_its_field(name: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        checked_name(name, param="alias")
    assert refused.value.param == "alias"
    with pytest.raises(InvalidRequestError):
        AdapterName("tenant", name)


def test_a_version_is_64_hex_digits_with_or_without_its_prefix() -> None:
    assert checked_version(_VERSION) == checked_version(f"sha256:{_VERSION}") == _VERSION
    for text in ("", "ab", "AB" * 32, "zz" * 32, f"md5:{_VERSION}", _VERSION + "\n"):
        assert not is_version(text)
        with pytest.raises(InvalidRequestError):
            checked_version(text)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.booleans())))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(backwards)
    assert json.loads(canonical_json(value)) == value


def test_a_version_is_the_digest_of_all_of_its_content() -> None:
    content = content_of(files_of("one"))
    assert content.version == version_of("one") != version_of("two")
    for change in (
        {"family": "lora"},
        {"ranks": {"q_proj": 3}},
        {"dtype": "bfloat16"},
        {"base_digest": None},
    ):
        assert content.model_copy(update=change).version != content.version


def test_no_version_changes_when_this_code_does() -> None:
    """Published versions are for ever: a change of this value would orphan every registry."""
    assert version_of("one") == "3bbb685d3082477288655be08d277610da75da9cfabb78ff1f26dead4979300e"


def test_adapter_sets_differ_by_version() -> None:
    one, two = AdapterSet.of(_VERSION), AdapterSet.of(AdapterVersion("cd" * 32))
    base = AdapterSet.of(None)
    assert len({one.digest, two.digest, base.digest}) == 3
    assert base.is_base and base.version is None
    assert one.version == _VERSION and one == AdapterSet.of(_VERSION)
    with pytest.raises(InvalidRequestError):
        AdapterSet(((_VERSION, 0.5),))
    with pytest.raises(InvalidRequestError):
        AdapterSet(((_VERSION, 1.0), (_VERSION, 1.0)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (_BASE, ModelName(None)),
        ("pirate", ModelName("pirate")),
        ("pirate@prod", ModelName("pirate", "prod")),
        (f"pirate@sha256:{_VERSION}", ModelName("pirate", f"sha256:{_VERSION}")),
        (f"{_BASE}:pirate", ModelName("pirate")),
        (f"{_BASE}:pirate@prod", ModelName("pirate", "prod")),
    ],
)
def test_a_model_id_means_the_base_or_one_adapter(model: str, expected: ModelName) -> None:
    assert parse_model_id(model, _BASE, {"pirate"}.__contains__) == expected


@pytest.mark.parametrize(
    "model", ["", "unknown", "base", f"{_BASE}:unknown", f"other:{_BASE}", "PIRATE", "unknown@prod"]
)
def test_an_unknown_model_is_never_the_base(model: str) -> None:
    with pytest.raises(UnknownModelError) as unknown:
        parse_model_id(model, _BASE, {"pirate"}.__contains__)
    assert unknown.value.param == "model" and repr(model) in unknown.value.message


def test_a_name_of_both_the_base_and_an_adapter_is_ambiguous() -> None:
    with pytest.raises(AmbiguousModelError, match="both:both"):
        parse_model_id("both", "both", {"both"}.__contains__)
    assert parse_model_id("both:both", "both", {"both"}.__contains__) == ModelName("both")


@pytest.mark.parametrize("model", [f"{_BASE}@prod", "pirate@", f"{_BASE}@"])
def test_a_version_that_cannot_be_is_refused(model: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_model_id(model, _BASE, {"pirate"}.__contains__)


def test_every_error_crosses_a_process_boundary_whole() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, FloraError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what to do", param="field")))
        assert (type(copy), copy.message, copy.param) == (kind, "what to do", "field")
    assert len({kind.code for kind in kinds}) >= len(kinds) - 2
