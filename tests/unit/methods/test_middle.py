"""What stands between stems and heads: token by token it is a matrix, and of averaged weights the mean of these."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from multiflora import PartsConfig
from multiflora.export.fit import averaged
from multiflora.export.moments import features
from multiflora.methods.middle import ONE_LAYER, Made

RANK, SCALE, TOKENS = 3, 2.0, 5
MIDDLES = [
    {"core": "full", "gate": "sum", "num_heads": 1, "num_cores": 4},
    {"core": "diagonal", "gate": "sum", "num_heads": 1, "num_cores": 2},
    {"stem": "blended", "gate": "stem", "num_stems": 4},
    {"task_matrix": "full", "gate": "sum", "num_heads": 1},
    {"task_matrix": "diagonal", "gate": "sum", "num_heads": 1},
]
BY_TOKEN = MIDDLES[:3]


def layer_of(words):
    torch.manual_seed(0)
    config = PartsConfig(**words, r=RANK, lora_alpha=SCALE * RANK, num_tasks=3, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(7, 6)).double(), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    for part in layer.parts("default").values():
        part.data.add_(torch.randn(part.shape, dtype=part.dtype))
    parts = {name: part.detach() for name, part in layer.parts("default").items()}
    x = torch.randn(TOKENS, 7, dtype=torch.float64)
    logits = parts["router"] @ x.t() if "router" in parts else None
    made = Made(SCALE * parts["A"] @ x.t(), logits, torch.tensor([2, 0, 1, 2, 0]), SCALE)
    return layer, config, parts, x, made


@pytest.mark.parametrize("words", MIDDLES, ids=lambda words: "-".join(map(str, words.values())))
def test_each_token_s_matrix(words):
    layer, config, parts, _, made = layer_of(words)
    middle = layer.method_of("default").middle
    v, weights = middle.read(config, parts, made, ONE_LAYER), middle.weights(config, parts, made, ONE_LAYER)
    assert v.shape == (RANK, TOKENS)
    for token in range(TOKENS):
        own = None if weights is None else weights[:, token]
        matrix = middle.constant(config, parts, int(made.tasks[token]), own)
        assert matrix.shape == (RANK, middle.stems(config) * RANK)
        assert torch.allclose(matrix @ made.u[:, token], v[:, token])


@pytest.mark.parametrize("words", BY_TOKEN, ids=lambda words: "-".join(map(str, words.values())))
def test_the_mean_of_weights_takes_their_place(words):
    layer, config, parts, x, made = layer_of(words)
    method = layer.method_of("default")
    weights = method.middle.weights(config, parts, made, ONE_LAYER)
    assert torch.allclose(weights.sum(0), torch.ones(TOKENS, dtype=weights.dtype))
    moments = features(method, config, parts, x, torch.zeros(TOKENS, 6, dtype=torch.float64))
    assert torch.allclose(moments.mean_blend, weights.mean(1), atol=1e-6)
    A, B = averaged(method, config, parts, SCALE, moments)
    gate = moments.mean_gate
    heads = sum(gate[h] * parts["B"][:, h * RANK : (h + 1) * RANK] for h in range(config.num_heads))
    assert torch.allclose(
        B @ A, SCALE * heads @ method.middle.constant(config, parts, None, weights.mean(1)) @ parts["A"]
    )
    even = method.middle.constant(config, parts, None, None)
    assert torch.allclose(
        even, method.middle.constant(config, parts, None, torch.full((len(weights),), 1 / len(weights)))
    )


@pytest.mark.parametrize("words", BY_TOKEN, ids=lambda words: "-".join(map(str, words.values())))
def test_a_batch_without_tokens(words):
    layer = layer_of(words)[0]
    y = layer(torch.zeros(0, 7, dtype=torch.float64, requires_grad=True))
    assert y.shape == (0, 6)
    y.sum().backward()
