"""Adapters whose version shows in the text: each makes the model say one letter, whatever it is asked."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from safetensors.torch import load_file

from deployments.text import TextCodec
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.base_checkpoint import BaseFacts
from storage.formats.writing import write_lora

# So loud that nothing the prompt says is heard beside it; the adapter formats allow 1e4.
_LOUD = 1e3


class TellingAdapters:
    """LoRA of rank 1 on the last feed-forward block of a Llama with tied embeddings.

    The block multiplies two branches; both are made the same number there, so their product is its square and points
    the same way whatever goes in: at one token's embedding.
    """

    def __init__(self, base_dir: Path, base: BaseFacts, codec: TextCodec) -> None:
        self._base = base
        weights = load_file(base_dir / "model.safetensors")["model.embed_tokens.weight"]
        self._embedding_VH = weights.double()
        nearest = (weights @ weights.T).argmax(dim=1).tolist()
        tokens = {letter: codec.encode(letter) for letter in string.ascii_letters}
        self._tokens = {
            letter: one
            for letter, (one, *more) in tokens.items()
            if not more and nearest[one] == one
        }

    @property
    def letters(self) -> str:
        """What can be said: letters that are one token, and not drowned by a longer embedding."""
        return "".join(self._tokens)

    def files(self, letter: str) -> dict[str, bytes]:
        """An adapter directory that says `letter` for ever."""
        layer = max(int(path.split(".")[2]) for path in self._base.projections)
        block = f"model.layers.{layer}.mlp"
        num_in, num_hidden = self._base.projections[f"{block}.gate_proj"]
        heard = torch.randn(
            1, num_in, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        # Two units: a gate lets one sign through, and each unit sees the number with another sign.
        units = torch.zeros(1, num_hidden, dtype=torch.float64)
        units[0, :2] = torch.tensor([_LOUD, -_LOUD])
        token = self._tokens[letter]
        modules = {
            f"{block}.gate_proj": ModuleRows(add_q_EO=units, add_p_EI=heard),
            f"{block}.up_proj": ModuleRows(add_q_EO=units.clone(), add_p_EI=heard.clone()),
            f"{block}.down_proj": ModuleRows(
                add_q_EO=self._embedding_VH[token : token + 1].clone(),
                add_p_EI=units.sign().abs(),
            ),
        }
        return write_lora(AdapterRows(modules, self._base.digest), self._base.name)
