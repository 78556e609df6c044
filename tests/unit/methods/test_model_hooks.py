"""What the hooks see of a model: which layers lie in a decoder that has an encoder beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from multiflora import HydraLoraConfig
from multiflora.context import find


class Pair(nn.Module):
    """An encoder and a decoder, or one that says so."""

    def __init__(self, answer):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=answer != "no encoder")
        self.encoder, self.decoder, self.answer = nn.Linear(4, 4), nn.Linear(4, 4), answer

    def get_decoder(self):
        """The decoder, or what some models give instead."""
        return {"itself": self, "nothing": None}.get(self.answer, self.decoder)

    def forward(self, x):
        """One after the other."""
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize(
    ("answer", "layers"), [("decoder", {"decoder"}), ("itself", set()), ("nothing", set()), ("no encoder", set())]
)
def test_a_decoder_is_told_from_a_model_that_is_one(answer, layers):
    model = get_peft_model(Pair(answer), HydraLoraConfig(target_modules=["encoder", "decoder"]))
    model(torch.ones(2, 4))
    assert {name.rpartition(".")[2] for name in find(model).decoder_layers} == layers
