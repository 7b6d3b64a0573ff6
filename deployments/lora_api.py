"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as other servers of this API have them.

Texts and codes are vLLM's where it has them (`vllm/entrypoints/openai/serving_models.py`). Loading publishes a version
to the registry, so every replica has it; unloading deletes the adapter from there.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from deployments.api import Admin, api_of
from storage.errors import InvalidRequestError, UnknownModelError
from storage.identity import AdapterName

router = APIRouter(prefix="/v1", tags=["adapters"])


class LoadRequest(BaseModel):
    """`lora_path`: a directory or S3 prefix below one of `serve.adapter_sources`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"example": {"lora_name": "captain", "lora_path": "s3://models/captain"}},
    )

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"example": {"lora_name": "captain"}},
    )

    lora_name: str = ""


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load(request: Request, admin: Admin, body: LoadRequest) -> str:
    """Publish the adapter at `lora_path`; with `load_inplace` as the next version of one that is loaded."""
    if not body.lora_name or not body.lora_path:
        raise InvalidRequestError("Both 'lora_name' and 'lora_path' must be provided.")
    api = api_of(request)
    name = AdapterName(admin.tenant, body.lora_name)
    await api.publish(lambda: api.admin.load(name, body.lora_path, in_place=body.load_inplace))
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(request: Request, admin: Admin, body: UnloadRequest) -> str:
    """Delete the adapter from the registry; its files stay until garbage collection."""
    if not body.lora_name:
        raise InvalidRequestError(
            "'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name"
        )
    api = api_of(request)
    try:
        await asyncio.to_thread(api.admin.delete, AdapterName(admin.tenant, body.lora_name))
    except UnknownModelError:
        raise UnknownModelError(
            f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name"
        ) from None
    api.names.forget()
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
