"""How many inputs the tests of this folder make and refuse together; each test asserts its own part."""

from __future__ import annotations

from . import test_adapters, test_conversations, test_data_files, test_recipes, test_settings


def test_at_least_two_thousand_malformed_inputs_are_refused() -> None:
    refused = {
        "recipes": test_recipes.RECIPES,
        "task files": test_recipes.TASKS + test_recipes.TEMPLATES,
        "data files": sum(test_data_files.EACH.values()),
        "settings": test_settings.EACH * len(test_settings.KINDS),
        "conversations, chat templates and tokenizers": sum(test_conversations.EACH.values()),
        "adapters": test_adapters.EACH * len(test_adapters.KINDS),
    }
    print(refused, sum(refused.values()))
    assert min(refused.values()) >= 400
    assert sum(refused.values()) >= 2000
