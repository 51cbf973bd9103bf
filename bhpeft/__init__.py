"""bhpeft: fine-tune a frozen language model with few parameters, sharded, and know how sure it is.

Importing the package loads neither torch nor transformers: the scripts in `util/` read `results/`
with NumPy and pandas alone and start in under a second.
"""

import importlib.abc
import importlib.util
import logging
import sys

__version__ = "0.1.0"

# As peft imports it, on CPUs with bf16, bitsandbytes warns of an optional kernel that it would fetch from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _RegisterWithPeft(importlib.abc.MetaPathFinder):
    """Makes `PeftModel.from_pretrained` know BH-PEFT adapters, as soon as peft is imported and not before."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module("bhpeft.adapters.register").register()

            spec.loader.exec_module = execute_and_register
        return spec


if "peft" in sys.modules:
    importlib.import_module("bhpeft.adapters.register").register()
else:
    sys.meta_path.insert(0, _RegisterWithPeft())
