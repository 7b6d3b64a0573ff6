"""Everything an adapter does to one linear layer, for tokens of many adapters at once (FLoRA, arXiv 2312.05677)."""
