"""The arithmetic of packed branches: pure functions on tensors, no module, no configuration."""

from multiflora.ops.elementwise import blend
from multiflora.ops.experts import expert_heads, expert_stems, expert_times, grouped
from multiflora.ops.inference import Prepared, digest, infer, infer_experts
from multiflora.ops.mask import Dropout, draw_seed, dropout_mask, head_mask
from multiflora.ops.packed import branches, softmax
from multiflora.ops.reading import stems
from multiflora.ops.reference import loop
from multiflora.ops.writing import Base, heads

__all__ = [
    "Base",
    "Dropout",
    "Prepared",
    "blend",
    "branches",
    "digest",
    "draw_seed",
    "dropout_mask",
    "expert_heads",
    "expert_stems",
    "expert_times",
    "grouped",
    "head_mask",
    "heads",
    "infer",
    "infer_experts",
    "loop",
    "softmax",
    "stems",
]
