"""ModelUtils, the walkthrough's way to load a model."""

from typing import Any

from finetune.models import load_for_inference


class ModelUtils:
    """Namespace kept from the walkthrough; new code calls finetune.models.load_for_inference."""

    @classmethod
    def load_model(
        cls, model_name_or_path: str, load_in_4bit: bool = False, adapter_name_or_path: str | None = None
    ) -> tuple[Any, Any]:
        """(model, tokenizer) of a base or merged checkpoint, or of an adapter on its base."""
        return load_for_inference(model_name_or_path, adapter_name_or_path, load_in_4bit)
