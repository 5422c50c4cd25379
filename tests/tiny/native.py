"""Random native models of hidden size 64 and padding-free micro-batches for them, for tests of numerics."""

from types import SimpleNamespace
from typing import Any

import torch

VOCABULARY = 97


def tiny_native(family: str = "qwen2", seed: int = 0, **changes: Any):
    """Qwen2 (biases, grouped-query heads), Llama or Qwen3 with random float32 weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        # The library's default of 0.02 would make every attention pattern flat and its mistakes invisible.
        "initializer_range": 0.25,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    config_class, model_class = classes[family]
    model = model_class(config_class(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_samples(lengths: list[int], seed: int = 0) -> list[SimpleNamespace]:
    """Rows of random ids; about half the labels are unsupervised, the last one never."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.5, -100, ids)
        labels[-1] = ids[-1]
        samples.append(SimpleNamespace(input_ids=ids.tolist(), labels=labels.tolist()))
    return samples


def padded_loss(model, samples: list[SimpleNamespace]) -> torch.Tensor:
    """The sum of token losses the ordinary way: right-padded rows, full logits, torch's cross-entropy."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.tensor([sample.input_ids + [0] * (longest - len(sample.input_ids)) for sample in samples])
    labels = torch.tensor([sample.labels + [-100] * (longest - len(sample.labels)) for sample in samples])
    mask = torch.tensor([[1] * len(s.input_ids) + [0] * (longest - len(s.input_ids)) for s in samples])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
    )


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every trainable parameter by name, after clearing old ones."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
