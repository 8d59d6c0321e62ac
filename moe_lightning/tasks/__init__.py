"""What ``predict`` computes for a row: text, a score, or an embedding."""

from moe_lightning.tasks.embed import Embed
from moe_lightning.tasks.generate import Generate
from moe_lightning.tasks.score import Score
from moe_lightning.tasks.task import Task

__all__ = ["Embed", "Generate", "Score", "Task"]
