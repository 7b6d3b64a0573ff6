"""`flora keys`: a key is shown once, listed without its secret, and revoked."""

from __future__ import annotations

from pathlib import Path

from cluster.key_store import KeyStore
from storage.config import StorageSettings
from storage.stores import open_store
from tests.cli.conftest import Flora, as_json


def test_a_key_is_made_listed_and_revoked(flora: Flora, home: Path) -> None:
    assert "flora keys create" in flora("keys", "ls").stdout
    made = as_json(flora("keys", "create", "--tenant", "team", "--note", "laptop", "--json"))
    token = flora("keys", "create", "--admin").stdout.strip()
    assert token.startswith("flora-")

    listed = as_json(flora("keys", "ls", "--json"))
    assert [(key["tenant"], key["is_admin"], key["note"]) for key in listed] == [
        ("team", False, "laptop"),
        ("default", True, ""),
    ]
    shown = flora("keys", "ls").stdout
    assert made["id"] in shown and made["key"] not in shown and token not in shown

    ring = KeyStore(open_store(StorageSettings(registry=str(home / "registry")))).ring()
    found = ring.find(made["key"])
    assert found is not None and found.tenant == "team"
    flora("keys", "revoke", made["id"])
    assert [key["id"] for key in as_json(flora("keys", "ls", "--json"))] == [listed[1]["id"]]


def test_a_note_is_text_and_not_markup(flora: Flora) -> None:
    flora("keys", "create", "--note", "[/home]")
    assert "[/home]" in flora("keys", "ls").stdout


def test_a_wrong_id_or_tenant_is_told(flora: Flora) -> None:
    assert "there is no key" in flora("keys", "revoke", "nothing", code=2).stderr
    assert "not a valid name" in flora("keys", "create", "--tenant", "No Name", code=2).stderr
