"""bhpeft: fine-tune a frozen language model with few parameters, sharded, and know how sure it is.

Importing the package loads neither torch nor transformers: the scripts in `util/` read `results/`
with NumPy and pandas alone and start in under a second.
"""

__version__ = "0.1.0"
