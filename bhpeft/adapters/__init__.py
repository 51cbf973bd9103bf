"""The adapters: what is trained while the base model is frozen. They know nothing of tasks."""

from bhpeft.adapters.attach import adopt_settings, attach_adapter, base_model_of, check_adapter, has_prefix, is_bayesian
from bhpeft.adapters.bh_peft import BhPeftConfig, gaussian_layers, kl_divergence
from bhpeft.adapters.posterior import drawn_noise, posterior_noise, posterior_samples
from bhpeft.adapters.register import register
from bhpeft.adapters.stock import target_modules_for, virtual_tokens

register()

__all__ = [
    "BhPeftConfig",
    "adopt_settings",
    "attach_adapter",
    "base_model_of",
    "check_adapter",
    "gaussian_layers",
    "has_prefix",
    "is_bayesian",
    "kl_divergence",
    "drawn_noise",
    "posterior_noise",
    "posterior_samples",
    "target_modules_for",
    "virtual_tokens",
]
