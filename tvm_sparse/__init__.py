"""A compiler for weight-sparse Qwen3.5: checkpoint in, one folder with a compiled library and packed weights out."""

__version__ = "0.1.0"
