"""`flora adapters import|gc|verify`: the registry as a whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cli.bases import BUILT_IN
from cli.console import AsJson, err, format_bytes, out, print_json, short
from cli.errors import EXIT_FAILED
from cli.settings import RegistryOption, S3Endpoint, base_facts, storage_settings
from storage.collection import DEFAULT_GRACE_S, Collector, Garbage
from storage.identity import DEFAULT_ALIAS, DEFAULT_TENANT, AdapterName, AdapterVersion
from storage.registry import Registry
from storage.stores import open_store
from storage.verification import Verification
from storage.verification import verify as verify_registry

_HOUR_S = 3600.0


def import_(
    source: Annotated[
        str, typer.Argument(help="A directory or s3://bucket/prefix with adapters below it.")
    ],
    base: Annotated[
        str | None, typer.Option(help=f"The base model they were made for. ({BUILT_IN})")
    ] = None,
    alias: Annotated[str, typer.Option(help="What the new versions are called.")] = DEFAULT_ALIAS,
    tenant: Annotated[str, typer.Option(help="Whose adapters.")] = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Publish every adapter below a place, each under its folder's name; bad ones are refused one by one.

    May be stopped and run again. Exit code 1 if any was refused.

    Example: [bold]flora adapters import ./adapters --base ./my-base[/]
    """
    from storage.adapter_source import open_source
    from storage.importing import import_adapters

    settings = storage_settings(registry, s3_endpoint)
    place = open_source(source, settings)
    store = Registry(open_store(settings))
    facts = base_facts(base, settings)
    colors = {"imported": "green", "unchanged": "dim", "refused": "red"}
    results = []
    imported = import_adapters(
        store,
        place,
        tenant,
        facts,
        place_name=Path(source.rstrip("/")).name,
        alias=alias,
        max_bytes=settings.max_adapter_bytes,
    )
    for each in imported:
        results.append(each)
        if not as_json:
            color = colors[each.outcome]
            what = f"  {each.what}" if each.what else ""
            version = "" if each.version is None else short(each.version)
            told = escape(f"{each.name} {version}{what}")
            out.print(f"[{color}]{each.outcome:9}[/] {told}", soft_wrap=True)
    counts = Counter(each.outcome for each in results)
    if as_json:
        print_json([asdict(each) for each in results])
    elif results:
        out.print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    else:
        out.print(f"no adapters below {escape(source)}", soft_wrap=True)
    if counts["refused"]:
        raise typer.Exit(EXIT_FAILED)


def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Do it; else only say what would go.")
    ] = False,
    keep_versions: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Also delete versions beyond the newest so many, unless an alias knows them.",
        ),
    ] = None,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="How long something must have been garbage.")
    ] = DEFAULT_GRACE_S / _HOUR_S,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Collect the garbage: deleted versions, and files that no version needs. Without --delete, only look.

    Example: [bold]flora adapters gc --keep-versions 5 --delete[/]
    """
    chosen = open_store(storage_settings(registry, s3_endpoint))
    collector = Collector(Registry(chosen), chosen, grace_s=grace_hours * _HOUR_S)
    old: list[tuple[AdapterName, AdapterVersion]] = []
    with err.status("looking for garbage"):
        if keep_versions is not None:
            find_old = collector.delete_old_versions if delete else collector.old_versions
            old = find_old(keep_versions)
        garbage = collector.collect() if delete else collector.find()
    if as_json:
        print_json({"deleted": delete, "old_versions": _versions(old), **_garbage(garbage)})
        return
    verb = "Deleted" if delete else "Would delete"
    for name, version in old:
        out.print(
            f"{verb} old version {name}@{short(version)}; its files go after the grace period"
        )
    for name, version in garbage.versions:
        out.print(f"{verb} {name}@{short(version)} for good")
    out.print(
        f"{verb} {len(garbage.versions)} deleted version(s) and {len(garbage.blobs)} file(s), "
        f"{format_bytes(garbage.num_bytes)}"
    )
    if not delete and (old or garbage.versions or garbage.blobs):
        err.print("To do it: add --delete")


def verify(
    name: Annotated[
        str | None, typer.Argument(help="One adapter; all of every tenant without it.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Write damaged manifests again and make the index anew."),
    ] = False,
    tenant: Annotated[str, typer.Option(help="Whose adapter.")] = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Read every stored byte against its digest. What is damaged goes into quarantine: it is not served any more.

    Publishing the same files again repairs them. Exit code 1 if anything is damaged.

    Example: [bold]flora adapters verify captain[/]
    """
    chosen = open_store(storage_settings(registry, s3_endpoint))
    adapter = None if name is None else AdapterName(tenant, name)
    with err.status("verifying") as progress:
        found = verify_registry(
            Registry(chosen), chosen, adapter, repair=repair, report=progress.update
        )
    if as_json:
        print_json(_verification(found))
    else:
        _tell(found)
    if found.damaged:
        raise typer.Exit(EXIT_FAILED)


def _tell(found: Verification) -> None:
    for damage in found.damaged:
        names = ", ".join(str(name) for name in damage.names)
        where = "  (in quarantine)" if damage.is_quarantined else ""
        out.print(
            f"[red]damaged[/] {names}@{short(damage.version)}: {escape(damage.what)}{where}",
            soft_wrap=True,
        )
    for name, version in found.repaired:
        out.print(f"[green]repaired[/] the manifest of {name}@{short(version)}")
    for version in found.lifted:
        out.print(f"[green]whole again[/] {short(version)}: out of quarantine")
    if found.reindexed:
        out.print(f"put right in the index: {len(found.reindexed)} adapter(s)")
    out.print(
        f"{found.versions} version(s), {found.files} file(s), {format_bytes(found.num_bytes)}: "
        + (f"{len(found.damaged)} damaged" if found.damaged else "all as they should be")
    )


def _versions(versions: list[tuple[AdapterName, AdapterVersion]]) -> list[dict[str, str]]:
    return [
        {"tenant": name.tenant, "name": name.name, "version": version} for name, version in versions
    ]


def _garbage(garbage: Garbage) -> dict[str, Any]:
    return {
        "versions": _versions(list(garbage.versions)),
        "files": len(garbage.blobs),
        "num_bytes": garbage.num_bytes,
    }


def _verification(found: Verification) -> dict[str, Any]:
    return {
        "versions": found.versions,
        "files": found.files,
        "num_bytes": found.num_bytes,
        "damaged": [
            {
                "version": damage.version,
                "names": [str(name) for name in damage.names],
                "what": damage.what,
                "quarantined": damage.is_quarantined,
            }
            for damage in found.damaged
        ],
        "repaired": _versions(list(found.repaired)),
        "lifted": list(found.lifted),
        "reindexed": [str(name) for name in found.reindexed],
    }
