"""Where a model comes from: the bundled pocket model, a folder, a GGUF file, or the hub; and how one is exported.

Nothing here imports torch before a model is loaded.
"""

from isotone.models.describe import ModelDescription, describe
from isotone.models.pin import pin_model, require_pinned
from isotone.models.save import save_model
from isotone.models.sources import load_model, load_tokenizer

__all__ = ["ModelDescription", "describe", "load_model", "load_tokenizer", "pin_model", "require_pinned", "save_model"]
