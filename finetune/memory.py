"""How much memory a training step takes, by part: pure arithmetic over the model's shape, no torch.

P is the number of weights. T tokens of a micro-batch, h hidden, q, kv widths of queries and keys, f feed-forward:

- QLoRA: projections in NF4, 0.516 bytes each (4 bits, a byte of scale per 64, a float per 16,384); the rest in 16
  bits.
- Full: 2 P weights, 2 P gradients, and 4 P moments in 16 bits (a copy on each card) or 12 P with 32-bit master weights
  (DeepSpeed). In the only micro-batch of an update gradients come while activations go, the head's before all others;
  stage 1 then leaves each card its part of them.
- A layer kept for the backward pass: 2 T (2 h + 2 q + 2 kv + 2 f), its norms and SwiGLU's product computed again
  (finetune.recipes); with DeepSpeed they are kept: 2 T (4 h + 2 q + 2 kv + 3 f). A recomputed layer: 2 T h, and one
  at a time while it is redone.

tests/test_plan.py compares the sums with what an H100 measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
HALF_BYTES = 2
ADAM_STATE_BYTES = 8  # two moments, 32 bits each
# Bytes of optimiser state of a trained weight, where it is not AdamW's in 32 bits.
STATE_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "adafactor": 1}
LOSS_CHUNK_ROWS = 1024  # supervised positions whose logits exist at once
LOSS_CHUNK_BYTES = 6  # their logits in 16 bits and in 32
BUCKET_ELEMENTS = 200_000_000  # gradients or parameters in one DeepSpeed transfer
BLOCK_ELEMENTS = 50_000_000  # small gradients in one transfer without DeepSpeed
LIVE_PARAMETERS = 1_000_000_000  # most that ZeRO-3 keeps gathered (stage3_max_live_parameters)
STAGES = ("none", "1", "2", "3", "2-offload", "3-offload")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama/Qwen2 kind."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    has_tied_head: bool = False
    has_qkv_bias: bool = False

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's seven projections: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        h, f = self.hidden, self.feed_forward
        return ((h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h))

    @property
    def projection_parameters(self) -> int:
        """Weights of the projections of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the head where it has its own."""
        return self.vocabulary * self.hidden * (1 if self.has_tied_head else 2)

    @property
    def parameters(self) -> int:
        """All weights: projections, biases, norms, embedding, head."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_size if self.has_qkv_bias else 0
        norms = (2 * self.layers + 1) * self.hidden
        return self.projection_parameters + self.layers * bias + norms + self.embedding_parameters

    @property
    def product_parameters(self) -> int:
        """Weights that every token is multiplied with: projections and head."""
        return self.projection_parameters + self.vocabulary * self.hidden

    def kept_per_token(self, has_recipes: bool) -> int:
        """Numbers that one layer keeps of each token for its backward pass, with finetune.recipes or without."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        recipes = 0 if has_recipes else 2 * self.hidden + self.feed_forward
        return 2 * self.hidden + 2 * q + 2 * kv + 2 * self.feed_forward + recipes

    def lora_parameters(self, rank: int) -> int:
        """Weights of A and B on all seven projections."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.projections)


# Published configurations, so that a plan needs no download: config.json of Qwen/Qwen-14B-Chat, Qwen-7B-Chat,
# Qwen-1_8B-Chat (their intermediate_size is twice the width of gate and up) and baichuan-inc/Baichuan2-7B-Chat.
KNOWN_SHAPES = {
    "qwen-14b": Shape(5120, 40, 40, 40, 128, 13696, 152064, has_qkv_bias=True),
    "qwen-7b": Shape(4096, 32, 32, 32, 128, 11008, 151936, has_qkv_bias=True),
    "qwen-1_8b": Shape(2048, 24, 16, 16, 128, 5504, 151936, has_qkv_bias=True),
    "baichuan2-7b": Shape(4096, 32, 32, 32, 128, 11008, 125696),
}


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """Shape of a config.json: native (Qwen2, Llama, ...) or the original Qwen-1 and Baichuan2 layouts.

    Raises UserError when it describes no decoder of this kind.
    """
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        is_qwen1 = config.get("model_type") == "qwen"
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            feed_forward=config["intermediate_size"] // (2 if is_qwen1 else 1),
            vocabulary=config["vocab_size"],
            has_tied_head=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=is_qwen1 or config.get("model_type") == "qwen2" or bool(config.get("attention_bias")),
        )
    except KeyError as missing:
        raise UserError(f"config.json: expected a decoder of the Llama kind, found no {missing}.") from None


def _activations(
    shape: Shape, tokens: int, layers_kept: int, width: int = HALF_BYTES, has_recipes: bool = True
) -> dict[str, float]:
    """Bytes of one micro-batch of `width`-byte numbers. `layers_kept` layers keep all, others are redone singly."""
    recomputed = shape.layers - layers_kept
    a_layer = tokens * shape.kept_per_token(has_recipes) * width
    inputs = recomputed * tokens * shape.hidden * width
    largest_weight = max(a * b for a, b in shape.projections) * width
    return {
        "activations": layers_kept * a_layer + inputs + max(a_layer if recomputed else 0, largest_weight),
        "logits": LOSS_CHUNK_ROWS * shape.vocabulary * LOSS_CHUNK_BYTES,
    }


def qlora_memory(
    shape: Shape,
    lora_rank: int,
    tokens: int,
    layers_kept: int,
    lora_bytes: int = 4,
    optimizer_bytes: int = ADAM_STATE_BYTES,
    gpus: int = 1,
    width: int = HALF_BYTES,
) -> dict[str, float]:
    """Bytes per card of a QLoRA step, by part.

    `lora_bytes` for each LoRA weight and again for its gradient, `optimizer_bytes` of state, `width` for activations.
    """
    lora = shape.lora_parameters(lora_rank)
    rest = shape.parameters - shape.projection_parameters
    return {
        "weights": shape.projection_parameters * NF4_BYTES + rest * width + lora * lora_bytes,
        "gradients": lora * lora_bytes,
        "optimizer": lora * optimizer_bytes,
        **_activations(shape, tokens, layers_kept, width),
        "buffers": min(lora, BLOCK_ELEMENTS) * lora_bytes if gpus > 1 else 0,
    }


def full_memory(
    shape: Shape, stage: str, gpus: int, tokens: int, layers_kept: int, micro_batches: int = 2
) -> dict[str, float]:
    """Bytes per card of a full-parameter step with a DeepSpeed stage (one of STAGES), by part.

    `micro_batches` of an update on a card; what counts is whether there are several.
    """
    p = shape.parameters
    level = int(stage[0]) if stage[0].isdigit() else 0
    offload = stage.endswith("offload")
    activations = _activations(shape, tokens, layers_kept, has_recipes=stage == "none")
    weights = HALF_BYTES * p / (gpus if level == 3 else 1)
    gradients = HALF_BYTES * p / (gpus if level >= 2 or (level == 1 and micro_batches == 1) else 1)
    if level == 0 and micro_batches == 1:
        gradients = max(HALF_BYTES * shape.vocabulary * shape.hidden, gradients - activations["activations"])
    optimizer = ADAM_STATE_BYTES / 2 * p if level == 0 else 12 * p / gpus
    if offload:
        weights, gradients, optimizer = (0 if level == 3 else weights), 0, 0
    live = HALF_BYTES * min(p, LIVE_PARAMETERS) if level == 3 else 0
    buckets = 2 * HALF_BYTES * min(p, BUCKET_ELEMENTS) if level else 0
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return {**parts, **activations, "buffers": buckets + live}


def host_memory(shape: Shape, stage: str) -> float:
    """Bytes of main memory that offloading takes: 32-bit weights and moments, gradients; for stage 3 the weights."""
    if not stage.endswith("offload"):
        return 0.0
    return shape.parameters * (12 + HALF_BYTES + (HALF_BYTES if stage.startswith("3") else 0))


def full_saved_bytes(parameters: int, stage: str, width: int = HALF_BYTES) -> tuple[int, int, int]:
    """(bytes of a checkpoint, of final/, of main memory while a checkpoint is written) of a full-parameter run.

    `width` bytes a weight. A checkpoint holds the weights as a model folder and both moments; DeepSpeed adds 32-bit
    weights and, in stages 1 and 2, the weights once more. Its ranks copy their part of the largest of these, the 32-bit
    numbers, one kind after the other; stage 3 gathers the weights in main memory besides.
    """
    weights = width * parameters
    if stage == "none":
        return weights + 2 * width * parameters, weights, weights
    states = 12 * parameters + (0 if stage.startswith("3") else weights)
    return weights + states, weights, 4 * parameters + (weights if stage.startswith("3") else 0)


def total(parts: Mapping[str, float]) -> float:
    """Sum of the parts, bytes."""
    return sum(parts.values())
