"""What a LoRA adapter does to each weight of its base model, exactly, or a refusal with the reason.

W' = W + s B A, with s = alpha / r (alpha / sqrt(r) for rsLoRA); DoRA: W' = m (W + s B A) / ||W + s B A|| row by row.
Layers trained as a whole (modules_to_save, biases) replace the base's. Computed in fp32, rounded once, at random: most
of what a short training changes is below half the distance between a weight and the next 16-bit number, and rounding to
the nearest would lose it (benchmarks/results/small_terms.md). The random numbers hang on the tensor's name alone.
"""

import math
import re
from pathlib import Path
from typing import Any
from zlib import crc32

from finetune.errors import UserError
from finetune.identity import ADAPTER_WEIGHTS, LORA_PREFIX, read_adapter_config
from finetune.tensor_files import Place, read_header

# settings whose effect is in the tensors, or that only concern training
KNOWN = {
    *(
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
    ),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
    *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
}
# initialisations that leave the base model as it is; the others (PiSSA, OLoRA, ...) take their part out of it
ROWS_AT_ONCE = 256
PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def check_config(config: dict[str, Any], adapter_dir: Path) -> None:
    """Raise UserError unless every setting is one whose effect on the weights is known."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')}, expected LORA")
    initialised = config.get("init_lora_weights", True)
    if initialised not in PLAIN_INITIALISATIONS:
        problems.append(f"init_lora_weights={initialised!r} changed the base model before training")
    problems += [f"{key}={value!r}" for key, value in sorted(config.items()) if value and key not in KNOWN]
    if problems:
        raise UserError(
            f"{adapter_dir} cannot be merged exactly: {'; '.join(problems)}. Use it as an adapter on its base model."
        )


def _pattern_value(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that is the module's name, or the end of it behind a dot."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


class LoraWeights:
    """The changes of one adapter, loaded when they are asked for."""

    def __init__(self, adapter_dir: str | Path, base: dict[str, Place], tied_embeddings: bool) -> None:
        """Raises UserError when something in the adapter can't be merged exactly into `base` (name -> place)."""
        self.folder = Path(adapter_dir)
        self.config = read_adapter_config(self.folder)
        check_config(self.config, self.folder)
        self.updates: dict[str, dict[str, str]] = {}  # weight -> its lora_A, lora_B, lora_magnitude_vector keys
        self.replacements: dict[str, str] = {}  # weight -> the key of the tensor that takes its place
        for key, place in read_header(self.folder / ADAPTER_WEIGHTS).items():
            self._sort_in(key, place, base)
        self._check_complete()
        embeddings = [name for name in (*self.updates, *self.replacements) if name.endswith("embed_tokens.weight")]
        if tied_embeddings and embeddings:
            self._refuse(f"it changes {embeddings[0]}, which this base model shares with its output layer")

    def _refuse(self, reason: str) -> None:
        raise UserError(f"{self.folder} cannot be merged exactly: {reason}. Use it as an adapter on its base model.")

    def _sort_in(self, key: str, place: Place, base: dict[str, Place]) -> None:
        name = key.removeprefix(LORA_PREFIX)
        match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name)
        if match:
            weight = match[1] + ".weight"
            self.updates.setdefault(weight, {})[match[2]] = key
        else:
            weight = name.replace(".base_layer.", ".")
            self.replacements[weight] = key
        if weight not in base:
            self._refuse(f"{key} has no counterpart in the base model")
        if not match and base[weight].shape != place.shape:
            self._refuse(f"{key} has shape {place.shape}, the base model's {base[weight].shape}")

    def _check_complete(self) -> None:
        wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if self.config.get("use_dora") else set())
        for weight, keys in self.updates.items():
            if set(keys) != wanted:
                self._refuse(f"{weight} has {', '.join(sorted(keys))}, expected {', '.join(sorted(wanted))}")

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return name in self.updates or name in self.replacements

    def _scaling(self, module: str, rank: int) -> float:
        alpha = _pattern_value(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def apply(self, name: str, weight: Any) -> Any:
        """The changed tensor, in the dtype of `weight` (out, in)."""
        import torch
        from safetensors import safe_open

        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            changed = tensors.get_tensor(self.replacements[name]) if name in self.replacements else weight
            if keys := self.updates.get(name):
                a, b = (tensors.get_tensor(keys[part]).float() for part in ("lora_A", "lora_B"))
                scaling = self._scaling(name.removesuffix(".weight"), a.shape[0])
                changed = torch.addmm(changed.float(), b, a, alpha=scaling)
                if magnitude := keys.get("lora_magnitude_vector"):
                    size = tensors.get_tensor(magnitude).float()
                    changed *= (size / torch.linalg.norm(changed, dim=1))[:, None]
        return _rounded(changed.float(), weight.dtype, name)


def _rounded(changed: Any, dtype: Any, name: str) -> Any:
    """fp32 to `dtype`, a few rows at a time, so that memory holds one such tensor."""
    import torch

    from finetune.rounding import copy_stochastic_

    generator = torch.Generator().manual_seed(crc32(name.encode()))
    target = torch.empty(changed.shape, dtype=dtype)
    for rows, values in zip(target.split(ROWS_AT_ONCE), changed.split(ROWS_AT_ONCE), strict=True):
        copy_stochastic_(rows, values, generator)
    return target
