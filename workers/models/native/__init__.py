"""A compact decoder of the Llama shape: the same weights and adapters as `hf`, fused and packed."""
