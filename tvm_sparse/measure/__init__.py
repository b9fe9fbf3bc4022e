"""Know the weights before compiling them: magnitudes, achievable sparsity, zero blocks, layer similarity."""
