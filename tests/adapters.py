"""LoRA adapters with random weights, made by peft itself."""

from pathlib import Path
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(model_dir: Path, folder: Path, spread: float = 0.05, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter on the model, all its tensors (B, magnitudes, trained biases too) moved by random numbers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), **settings})
    get_peft_model(model, config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    path = folder / "adapter_model.safetensors"
    moved = {k: v + spread * torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()}
    save_file(moved, path, metadata={"format": "pt"})
    return folder
