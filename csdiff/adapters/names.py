"""The adapters' names, importable without torch (the command line's help lists them)."""

ADAPTER_NAMES = ("mlp", "transformer", "linear", "lora", "diffusion")
