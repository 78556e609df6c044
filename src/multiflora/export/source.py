"""What is exported: an adapter's folder, or a model in memory; and the base model where it is needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multiflora.adapter_folder import check_there, load_adapter
from multiflora.base_model import loading
from multiflora.errors import AdapterError, ExportError
from multiflora.export.plain import CONFIG, ROOT, WEIGHTS, read_config
from multiflora.files import user_path
from multiflora.tensor_file import TensorFile

__all__ = ["adapter_folder", "base_name", "load_adapted", "load_base", "load_tokenizer_of", "put_on", "resize"]


@contextmanager
def adapter_folder(model_or_folder: Any) -> Iterator[Path]:
    """A folder with the adapter: the one given, or a temporary one that a model's active adapter is saved to.

    Raises:
        ExportError: No adapter is there, or several are active.
    """
    if isinstance(model_or_folder, str | Path):
        folder = user_path(model_or_folder)
        check_there(folder, ExportError)
        yield folder
        return
    model = model_or_folder
    if not hasattr(model, "save_pretrained"):
        raise ExportError(f"Got a {type(model).__name__}; expected a model with an adapter, or an adapter's folder.")
    with tempfile.TemporaryDirectory() as scratch:
        names = model.active_adapters if hasattr(model, "active_adapters") else []
        active = list(names() if callable(names) else names)
        if len(active) != 1:
            raise ExportError(
                f"The model has {len(active)} active adapters ({', '.join(active) or 'none'}); expected exactly one. "
                "Activate the one to convert with set_adapter(NAME)."
            )
        is_peft = hasattr(model, "peft_config") and hasattr(model, "base_model") and hasattr(model, "get_base_model")
        words = {"selected_adapters": active} if is_peft else {}
        model.save_pretrained(scratch, **words)
        inner = Path(scratch) / active[0]
        yield inner if (inner / CONFIG).is_file() else Path(scratch)


def base_name(folder: Path, base: str | Path | None) -> str:
    """What the base model is loaded from: what is given, else the run's recipe, else the adapter's config.

    Raises:
        ExportError: None of them says.
    """
    if base is not None:
        name = str(base)
    elif (folder / "recipe.yaml").is_file():
        from multiflora.recipe import load_recipe

        name = load_recipe(folder / "recipe.yaml").model.name
    else:
        name = read_config(folder).base_model_name_or_path or ""
    if not name:
        raise ExportError(f"{folder / CONFIG} does not name its base model. Give it: --base MODEL (folder or hub id).")
    if name == "embedded":
        from multiflora.embedded import embedded_model

        name = str(embedded_model())
    return name


def load_base(name: str, dtype: Any = "auto") -> Any:
    """Load a causal language model, in eval mode, in its own dtype.

    Raises:
        ExportError: There is none at that place.
    """
    from transformers import AutoModelForCausalLM

    with loading("base model", name, _of_base):  # a quantised one needs packages and devices, too
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True).eval()


def load_tokenizer_of(folder: Path, name: str) -> Any:
    """Load the tokenizer saved with an adapter, or else its base model's.

    Raises:
        ExportError: There is none.
    """
    from transformers import AutoTokenizer

    place = str(folder) if (folder / "tokenizer_config.json").is_file() else name
    with loading("tokenizer", place, _of_base):
        return AutoTokenizer.from_pretrained(place)


def load_adapted(folder: Path, name: str, dtype: Any = "auto", *, may_untie: bool = False) -> Any:
    """Load the base model and put the adapter on it."""
    return put_on(load_base(name, dtype), folder, may_untie=may_untie)


def put_on(model: Any, folder: Path, *, may_untie: bool = False) -> Any:
    """Put an adapter on a base model, whose vocabulary grows (or shrinks) to the adapter's where that has its own."""
    with TensorFile(folder / WEIGHTS, ExportError) as file:
        shapes = {name.removeprefix(ROOT).replace(".base_layer.", "."): file.shape(name) for name in file.names}
    resize(model, shapes)
    try:
        return load_adapter(model, folder, may_untie=may_untie).eval()
    except AdapterError as error:
        raise ExportError(f"{error} Name the base model with --base if it is another.") from error


def resize(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give a model's embedding as many rows as an adapter's tensor of that name has, if there is one."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    rows = next(iter(shapes.get(f"{name}.weight", ())), None)
    if rows is not None and rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _of_base(told: str) -> ExportError:
    return ExportError(f"{told}. Give the base model's folder or hub id with --base.")
