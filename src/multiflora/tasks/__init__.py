"""Tasks: where examples come from, how a row becomes text, how an answer is scored. Reading this needs no torch."""

from multiflora.tasks.chat import as_text
from multiflora.tasks.example import Example, Message
from multiflora.tasks.load import load_split
from multiflora.tasks.render import render
from multiflora.tasks.resolve import load_task
from multiflora.tasks.score import verify
from multiflora.tasks.shipped import ShippedTask, shipped_tasks
from multiflora.tasks.spec import FilesSource, GeneratorSource, HubSource, Score, Split, TaskSpec

__all__ = [
    "Example",
    "FilesSource",
    "GeneratorSource",
    "HubSource",
    "Message",
    "Score",
    "ShippedTask",
    "Split",
    "TaskSpec",
    "as_text",
    "load_split",
    "load_task",
    "render",
    "shipped_tasks",
    "verify",
]
