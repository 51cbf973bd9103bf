"""The adapters: what is trained while the base model is frozen. They know nothing of tasks."""

from bhpeft.adapters.attach import attach_adapter, base_model_of, check_adapter
from bhpeft.adapters.stock import target_modules_for, virtual_tokens

__all__ = ["attach_adapter", "base_model_of", "check_adapter", "target_modules_for", "virtual_tokens"]
