"""The tasks: rows -> examples, split honestly -> tensors. They know nothing of adapters."""

from bhpeft.tasks.example import Example, Task
from bhpeft.tasks.load import load_task

__all__ = ["Example", "Task", "load_task"]
