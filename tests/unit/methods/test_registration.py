"""What is registered with peft leaves the adapters of others as they were."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from multiflora import AdapterError


def test_an_adapter_of_peft_s_own_that_does_not_fit_is_refused_by_those_whose_it_is(tiny_llama, tmp_path):
    get_peft_model(tiny_llama(hidden_size=16), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as refused:
        tiny_llama().load_adapter(str(tmp_path))
    assert not isinstance(refused.value, AdapterError)
