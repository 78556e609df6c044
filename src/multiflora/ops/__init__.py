"""The arithmetic of packed branches: pure functions on tensors, no module, no configuration."""

from multiflora.ops.mask import draw_seed, dropout_mask, head_mask
from multiflora.ops.packed import Base, Dropout, blend, branches, heads, softmax, stems
from multiflora.ops.reference import loop

__all__ = [
    "Base",
    "Dropout",
    "blend",
    "branches",
    "draw_seed",
    "dropout_mask",
    "head_mask",
    "heads",
    "loop",
    "softmax",
    "stems",
]
