"""Export: adapters as what other software loads. Plain LoRA, dense checkpoints, llama.cpp adapters; sums and starts."""

from multiflora.export.convert import to_lora
from multiflora.export.report import AdapterReport, LayerReport, Report

__all__ = ["AdapterReport", "LayerReport", "Report", "to_lora"]
