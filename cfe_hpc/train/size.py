"""How large the model of a `[params]` table is, from its shape alone: nothing of torch is loaded.

The formulas follow cfe_hpc.train.model line by line; tests/test_planner_memory.py holds them against the model itself.
"""

from __future__ import annotations

from typing import Literal

from cfe_hpc.train.config import Params

__all__ = ["activation_bytes", "largest_layer", "parameter_count"]

Arithmetic = Literal["fp32", "bf16", "autocast"]
"""What the forward computes in. "autocast": weights and residual stream in fp32, matrix products in bf16."""


def parameter_count(params: Params) -> int:
    """Elements of all parameters."""
    outside = 2 * params.vocab_size * params.d_model + params.d_model
    return outside + params.layers * (_matrices(params) + 2 * params.d_model)


def largest_layer(params: Params) -> int:
    """Elements of the largest matrix: what ZeRO 3 gathers at once, at the least."""
    width = max(3 * params.d_model, 2 * params.ff_dim, params.vocab_size)
    return params.d_model * width


def activation_bytes(params: Params, *, micro_batch: int, arithmetic: Arithmetic) -> int:
    """Bytes that one rank keeps from the forward of a micro-batch for its backward.

    Attention is taken to run fused, as it does on CUDA, on Gaudi and on CPUs: the scores, quadratic in seq_len, are
    never kept, only a sum in fp32 for each head and token.
    """
    tokens = micro_batch * params.seq_len
    d, f, heads = params.d_model, params.ff_dim, params.heads
    narrow = 4 if arithmetic == "fp32" else 2
    # A norm keeps its input and its normed input in fp32, and its output for the matrix that takes it.
    norm = {"fp32": 4 + 4 + 4, "bf16": 4 + 2 + 2, "autocast": 4 + 4 + 2}[arithmetic] * d
    # Queries, keys and values; queries and keys rotated; what attention gives, and the same by tokens.
    attention = narrow * (3 * d + 2 * d + 2 * d) + 4 * heads
    # Gate and up; silu of the gate; the product.
    feed_forward = narrow * 4 * f
    block = 2 * norm + attention + feed_forward
    # Of the logits the log-softmax alone stays, in fp32; for a moment they are there beside it, and in bf16 once more.
    logits = (8 if arithmetic == "fp32" else 10) * params.vocab_size
    # Autocast keeps its bf16 copies of the matrices.
    matrices = params.layers * _matrices(params) + params.vocab_size * params.d_model
    copies = 2 * matrices if arithmetic == "autocast" else 0
    return tokens * (params.layers * block + norm + logits) + copies


def _matrices(params: Params) -> int:
    """Elements of one block's matrices: wqkv, wo, w_in and w_out."""
    return 4 * params.d_model**2 + 3 * params.d_model * params.ff_dim
