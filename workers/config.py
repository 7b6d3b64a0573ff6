"""Settings of one engine: its model, its bank, its cache, its steps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineSettings(BaseModel):
    """One replica's engine. The defaults fit a laptop and a small model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(
        default="~/.flora/bases/smollm2-135m-instruct",
        description="A directory in transformers' layout, a .gguf file, s3://bucket/prefix with either, or a hub id.",
    )
    base_id: str = Field(
        default="smollm2-135m-instruct",
        min_length=1,
        description="What users call the base model.",
    )
    dtype: Literal["float64", "float32", "bfloat16"] = "bfloat16"
    runner: Literal["auto", "hf", "native"] = Field(
        default="auto",
        description="hf: any transformers model; native: Llama-shaped ones, faster; auto: native where it can be.",
    )
    decode_graphs: bool = Field(
        default=True,
        description="On a GPU: the native runner's decode steps are replayed from recorded graphs.",
    )
    compiled: bool = Field(
        default=True,
        description="On CPU: loops compiled with this machine's C++ compiler, where it has one.",
    )
    transport: Literal["auto", "thread", "process"] = Field(
        default="auto",
        description="Where the engine runs: in a thread of its replica, or in a process of its own; "
        "auto: a process on a GPU, else a thread.",
    )
    deterministic: bool = Field(
        default=False,
        description="Compute every run of tokens in one mode, whatever is measured faster: in float32 an answer is "
        "then the same in any batch, up to tokens whose logits differ by rounding.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of the model; 0: the CPUs this process may use (or OMP_NUM_THREADS of them), "
        "divided by the replicas that share the machine.",
    )
    max_sequences: int = Field(default=32, ge=1, le=4096, description="Sequences decoded together.")
    max_sequence_tokens: int = Field(
        default=2048, ge=16, description="Prompt and answer together; also the model's own limit."
    )
    max_step_tokens: int = Field(
        default=512, ge=1, description="Tokens of one forward; longer prompts are cut into chunks."
    )
    max_step_work: int = Field(
        default=8192,
        ge=1,
        description="Rank-weighted tokens, 1 + rank each, after which a step takes no more of prompts.",
    )
    memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes on the device beside the weights: bank, keys and values, scratch. Sizes that are 0 are "
        "made to fit it, half of what is free to each; 0: as the sizes say.",
    )
    kv_block_tokens: int = Field(default=16, ge=1, le=1024, description="Tokens of one KV block.")
    kv_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens whose keys and values are kept, for all sequences and the prefix cache together; "
        "0: what memory_bytes leaves, or max_sequences times max_sequence_tokens.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep keys and values of finished requests for later ones of the same tenant and adapter.",
    )
    bank_rows: int = Field(
        default=256,
        ge=0,
        description="Rank rows the device holds in every module, for all adapters; 0: what memory_bytes leaves.",
    )
    bank_slots: int = Field(default=256, ge=1, description="Adapters the device holds at most.")
    load_concurrency: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Loads of adapters at a time from this machine, and as many from the registry.",
    )
    starvation_s: float = Field(
        default=5.0,
        gt=0,
        description="A request waiting this long for bank rows stops new work on the adapters that hold them.",
    )
    step_timeout_s: float = Field(
        default=300.0, gt=0, description="A step that takes longer makes the replica unhealthy."
    )

    @property
    def kv_blocks(self) -> int:
        """KV blocks in all; by default enough for every sequence at its longest."""
        if self.kv_tokens:
            return max(1, self.kv_tokens // self.kv_block_tokens)
        return self.max_sequences * -(-self.max_sequence_tokens // self.kv_block_tokens)
