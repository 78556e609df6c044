"""The promise at the size of a real model: SmolLM2-135M, every exact method, stock peft, float32."""

from __future__ import annotations

import pytest
import torch
from made_adapters import BY_TASK, EXACT, adapted
from test_export_lora import in_stock_peft

import multiflora
from multiflora.embedded import find_gguf

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(find_gguf() is None, reason="the embedded model is not installed: make demo installs it"),
]


def test_every_exact_method_gives_the_same_logits_where_multiflora_cannot_be_imported(tmp_path):
    from transformers import AutoModelForCausalLM

    from multiflora.embedded import embedded_model

    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    ids = torch.tensor([[504, 2963, 314, 260, 3075, 282, 7129, 30, 378, 5345, 28, 339]])
    with torch.no_grad():
        plain = base(ids).logits
    wanted = {}
    for name in EXACT + BY_TASK:
        # so far from the start that logits change by about one, as a trained adapter's do; M-LoRA's heads start random
        model = adapted(name, base, by=0.002 if name == "mlora" else 0.02)
        report = multiflora.to_lora(model, tmp_path / name)
        for made in report.adapters:
            with torch.no_grad(), multiflora.task(model, made.task or 0):
                wanted[str(report.folder(made))] = model(ids).logits
        base = model.unload()
        with torch.no_grad():
            assert torch.equal(base(ids).logits, plain)
    found = in_stock_peft(base, list(wanted), tmp_path, ids)
    for folder, logits in wanted.items():
        off, moved = (found[folder] - logits).abs().max(), (logits - plain).abs().max()
        print(f"{folder}: off by {off:.1e}, moved by {moved:.2f}, largest {logits.abs().max():.1f}")
        assert moved > 0.1
        # logits reach 20: 1e-5 of their size is ten times the rounding of one float32 product
        assert off < 1e-5 * logits.abs().max(), folder
