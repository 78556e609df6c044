"""Rows of reasoning-gym: seeded, as many as asked for, and able to verify answers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from multiflora.errors import ConfigError
from multiflora.suggest import did_you_mean
from multiflora.tasks.spec import GeneratorSource, Split

__all__ = ["generator_rows", "split_range"]

# The generator seeds row i with seed + i, so two seeds close together share rows. One seed and disjoint ranges of i
# do not. Test rows come first: asking for more training rows then leaves the test as it was.
_ORDER: tuple[Split, ...] = ("test", "validation", "train")


def split_range(source: GeneratorSource, split: Split) -> range:
    """Row numbers of a split within the generator.

    Example:
        >>> split_range(GeneratorSource(generator="gcd", sizes={"test": 20, "train": 50}), "train")
        range(20, 70)
    """
    before = _ORDER[: _ORDER.index(split)]
    start = sum(source.sizes.get(s, 0) for s in before)
    return range(start, start + source.sizes.get(split, 0))


def generator_rows(source: GeneratorSource) -> Any:
    """Build the reasoning-gym data set of a source; indexing it makes a row.

    Raises:
        ConfigError: The generator, or one of its settings, does not exist or is refused by the generator.
    """
    return _rows(source.model_dump_json())


@lru_cache(maxsize=64)
def _rows(source_json: str) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset  # here: its import takes seconds

    source = GeneratorSource.model_validate_json(source_json)
    if source.generator not in DATASETS:
        raise ConfigError(
            f"{source.generator!r} is not a reasoning-gym generator; {did_you_mean(source.generator, DATASETS)}"
        )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in source.settings.items()}
    known = set(DATASETS[source.generator][1].__dataclass_fields__) - {"seed", "size"}
    for key in settings:
        if key not in known:
            raise ConfigError(f"settings.{key} is not a setting of {source.generator}; {did_you_mean(key, known)}")
    try:
        return create_dataset(source.generator, seed=source.seed, size=max(1, sum(source.sizes.values())), **settings)
    except (AssertionError, TypeError, ValueError) as error:  # how its generators refuse a setting
        raise ConfigError(f"reasoning-gym refuses the settings {settings} of {source.generator}: {error}") from error
