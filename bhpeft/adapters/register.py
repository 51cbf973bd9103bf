"""Makes BH-PEFT a method of peft: after `import bhpeft`, `PeftModel.from_pretrained` loads it.

peft's own `register_peft_method` refuses names outside its closed enumeration (peft 0.21.2, utils/peft_types.py), but
all it does is fill three tables, and plain string keys work in them from end to end.
"""

from __future__ import annotations

from peft import mapping

from bhpeft.adapters.bh_peft import PEFT_TYPE, BhPeftConfig, BhPeftModel


def register() -> None:
    """Fill peft's tables; calling it again changes nothing."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BhPeftConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BhPeftModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BhPeftModel.prefix
