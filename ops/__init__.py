"""Single-device operators: a definition (`reference`) and its implementations, one folder each.

Operators know nothing of ranks. Tensors are `[B, T, H, D]` unless a docstring says otherwise.
"""
