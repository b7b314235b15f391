"""How ranks share a model: one process, DDP, FSDP2, HSDP, DeepSpeed ZeRO."""
