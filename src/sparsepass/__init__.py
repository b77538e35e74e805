"""sparsepass: a compiler for N:M sparsity of transformer models."""
