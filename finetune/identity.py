"""Which model is this? A fingerprint of its weights, and the check that an adapter was trained on them.

Reads a few kilobytes of every tensor, so a 28 GB checkpoint takes a moment and no memory. Training puts
the fingerprint into the marker of every checkpoint (finetune/saving.py).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.json_files import read_json_object
from finetune.saving import read_marker
from finetune.tensor_files import Place, read_header, tensor_places

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAMPLE_BYTES = 4096
LORA_PREFIX = "base_model.model."


def _samples(places: dict[str, Place]) -> Iterator[bytes]:
    """Each tensor's name, dtype, shape and the bytes in its middle, by name: how it is cut into files plays no part."""
    for name in sorted(places):
        place = places[name]
        yield f"{name} {place.dtype} {place.shape}".encode()
        with open(place.file, "rb") as stream:
            stream.seek(place.start + max(0, (place.size - SAMPLE_BYTES) // 2))
            yield stream.read(min(SAMPLE_BYTES, place.size))


def _places(folder: Path) -> dict[str, Place]:
    """The tensors of a checkpoint; where they are pickled, whole files stand for them."""
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        return {file.name: Place(file, "file", (), 0, file.stat().st_size) for file in pickled}
    return tensor_places(folder)


def fingerprint(model_dir: str | Path) -> str:
    """Hex digest that tells checkpoints with different weights apart."""
    return hashlib.sha256(b"".join(_samples(_places(Path(model_dir))))).hexdigest()


def adapter_fingerprint(adapter_dir: str | Path) -> str:
    """Hex digest of an adapter's weights and of the settings that change what they do (alpha, rank, ...)."""
    settings = read_adapter_config(adapter_dir)
    for key in ("base_model_name_or_path", "peft_version", "revision", "inference_mode"):
        settings.pop(key, None)
    places = read_header(Path(adapter_dir) / ADAPTER_WEIGHTS)
    text = json.dumps(settings, sort_keys=True).encode()
    return hashlib.sha256(text + b"".join(_samples(places))).hexdigest()


def recorded_base(adapter_dir: str | Path) -> str | None:
    """Fingerprint of the base model, from the marker that training wrote; None for adapters from elsewhere."""
    return (read_marker(adapter_dir) or {}).get("identity", {}).get("base_model")


def read_adapter_config(adapter_dir: str | Path) -> dict[str, Any]:
    """The adapter's configuration. Raises UserError when the folder holds no finished LoRA adapter."""
    folder = Path(adapter_dir)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).exists():
            raise UserError(f"{folder}: expected a LoRA adapter, found no {name}. Run `make qwen-train` first.")
    return read_json_object(folder / ADAPTER_CONFIG, "adapter configuration", "")


def check_adapter(adapter_dir: str | Path, model_dir: str | Path) -> None:
    """Raise UserError unless the adapter belongs to this base model: by fingerprint where known, by name, by shapes."""
    adapter_dir, model_dir = Path(adapter_dir), Path(model_dir)
    trained_on = Path(read_adapter_config(adapter_dir).get("base_model_name_or_path") or "")
    recorded = recorded_base(adapter_dir)
    if recorded:
        same = recorded == fingerprint(model_dir)
    elif (trained_on / "config.json").exists():
        same = trained_on.samefile(model_dir) or fingerprint(trained_on) == fingerprint(model_dir)
    else:
        same = trained_on.name == model_dir.name
    if not same:
        raise UserError(
            f"{adapter_dir} was trained on {trained_on}, not on the weights in {model_dir}: "
            "name the model it was trained on, or the adapter of this one."
        )
    _check_shapes(adapter_dir, model_dir)


def _check_shapes(adapter_dir: Path, model_dir: Path) -> None:
    """A (rank, in) and B (out, rank) must fit the weight (out, in) they belong to."""
    base = tensor_places(model_dir)
    for name, place in read_header(adapter_dir / ADAPTER_WEIGHTS).items():
        module, _, part = name.removeprefix(LORA_PREFIX).rpartition(".lora_")
        if not module or part not in ("A.weight", "B.weight"):
            continue
        weight = base.get(module + ".weight")
        axis = 1 if part[0] == "A" else 0
        if weight is None or weight.shape[axis] != place.shape[axis]:
            found = f"a weight of shape {weight.shape}" if weight else "no such weight"
            raise UserError(f"{adapter_dir} does not fit {model_dir}: {name} has shape {place.shape}, found {found}.")
