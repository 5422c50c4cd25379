"""Baichuan2's NormHead: a head whose rows are L2-normalised in every forward pass.

While such a model trains, finetune.loss normalises in each pass, as published. What is saved for use has the
normalisation folded in, so that plain LlamaForCausalLM computes the trained model's logits.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from finetune.saving import read_marker
from finetune.tensor_files import Place, read_header, tensor_places, write_shard

HEAD = "lm_head.weight"
CONVERSION = "conversion.json"


def has_norm_head(model_dir: str | Path) -> bool:
    """Whether training has to normalise the head: by the marker of its conversion, or of the training it came from."""
    folder = Path(model_dir)
    path = folder / CONVERSION
    conversion = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return bool(conversion.get("norm_head") or (read_marker(folder) or {}).get("norm_head"))


def fold_head(model_dir: str | Path) -> None:
    """Replace the head's rows w by w / |w|, computed in 32 bits; only the file that has them is rewritten."""
    file = tensor_places(Path(model_dir))[HEAD].file
    write_shard(file, read_header(file), _normalized(file, read_header(file)))


def _normalized(file: Path, places: dict[str, Place]) -> Iterator[tuple[str, memoryview]]:
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in places:
            tensor = tensors.get_tensor(name)
            if name == HEAD:
                tensor = torch.nn.functional.normalize(tensor.float(), dim=1).to(tensor.dtype)
            yield name, memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
