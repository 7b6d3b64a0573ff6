"""`flora chat`: talk to the base model or an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any

import typer

from cli.client import ApiClient, Message, Served, Url
from cli.console import AsJson, err, out, print_error, print_json, short
from storage.errors import FloraError


def chat(
    model: Annotated[str, typer.Argument(help="The base, an adapter, or either with @version.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this once, print the answer, and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest.")] = 0,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model; answers appear as they are made. Ctrl-C stops an answer, Ctrl-D ends.

    Example: [bold]flora chat captain --prompt "How do I learn to swim?"[/]
    """
    client = ApiClient(url)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    options = {"max_tokens": max_tokens, "temperature": temperature}
    if as_json:
        question = prompt if prompt is not None else sys.stdin.read().strip()
        answer = client.chat(model, [*messages, _user(question)], **options)
        print_json({"model": model, "answer": answer.text, **answer.served.as_dict()})
    elif prompt is not None:
        _answer(client, model, [*messages, _user(prompt)], options)
    else:
        _converse(client, model, messages, options)


def _converse(
    client: ApiClient, model: str, messages: list[Message], options: Mapping[str, Any]
) -> None:
    for line in _questions():
        try:
            text = _answer(client, model, [*messages, _user(line)], options)
        except KeyboardInterrupt:
            out.print()
        except FloraError as error:
            print_error(error)
        else:
            messages += [_user(line), {"role": "assistant", "content": text}]


def _answer(
    client: ApiClient, model: str, messages: list[Message], options: Mapping[str, Any]
) -> str:
    pieces: list[str] = []
    with client.stream_chat(model, messages, **options) as (served, deltas):
        for piece in deltas:
            pieces.append(piece)
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    typer.echo()
    if sys.stdout.isatty():
        err.print(f"[dim]{_described(served)}[/]")
    return "".join(pieces)


def _questions() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing
    asks = "› " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asks).strip()
        except (EOFError, KeyboardInterrupt):
            if asks:
                out.print()
            return
        if line:
            yield line


def _described(served: Served) -> str:
    who = f"adapter {short(served.version)} from {served.tier}" if served.version else "base"
    return f"{who} · replica {served.replica}"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
