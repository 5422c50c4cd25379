"""A transformers decoder's own modules, driven over the tokens of many requests laid end to end, without padding.

Covers Llama, Mistral, Qwen2 and Qwen3 (what the converted checkpoints are), with LoRA adapters and 4-bit layers inside.
Where the projections are plain, q, k, v and gate, up become one product each; the model's own weights turn into views
of the joined ones, so nothing is held twice. Dimensions: T tokens, C hidden size, H query heads, G key/value heads,
D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.generate import causal_model
from llm_code.module_interface.operations import Operations

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
Projection = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """What happens between the projections of a layer, for all tokens of a step."""

    def __call__(self, layer: int, qkv_TC: Tensor, norms: tuple[Any, Any]) -> Tensor: ...


def check_supported(model: Any) -> None:
    """Raise UserError unless the decoder below computes what the model's own forward does."""
    config = causal_model(model).config
    problems = []
    if config.model_type not in SUPPORTED:
        problems.append(f"a {config.model_type} model (known: {', '.join(SUPPORTED)})")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        problems.append("sliding-window attention")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        problems.append(f"{rope} rotary embeddings, which change with the length")
    if problems:
        raise UserError(f"the local engine does not cover {' and '.join(problems)}. Serve it with ENGINE=vllm.")


class Joined:
    """Plain linear layers of the same input as one product. On a CPU the weight is stored (in, out).

    MKL multiplies a few rows by such a weight two to three times faster than by (out, in).
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.data for layer in layers]) if len(layers) > 1 else layers[0].weight.data
        self.weight = weight if weight.is_cuda else weight.t().contiguous().t()
        self.bias = None
        if any(layer.bias is not None for layer in layers):
            zeros = [torch.zeros_like(layer.weight[:, 0]) for layer in layers]
            biases = [z if layer.bias is None else layer.bias.data for layer, z in zip(layers, zeros, strict=True)]
            self.bias = torch.cat(biases)
        begin = 0
        for layer in layers:
            layer.weight.data = self.weight[begin : begin + layer.out_features]
            begin += layer.out_features

    def __call__(self, x_TC: Tensor) -> Tensor:
        return nn.functional.linear(x_TC, self.weight, self.bias)


def _project(layers: Sequence[nn.Module]) -> Projection:
    """One function for several projections, their outputs side by side."""
    if all(type(layer) is nn.Linear for layer in layers):
        return Joined(layers)
    if len(layers) == 1:
        return layers[0]
    return lambda x_TC: torch.cat([layer(x_TC) for layer in layers], dim=-1)


def _head(lm: Any) -> Projection:
    """The output layer; one tied to the embedding is copied on a CPU, where both want another layout."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.is_cuda:
        return head
    if head.weight.data_ptr() == lm.get_input_embeddings().weight.data_ptr():
        twin = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        twin.weight = nn.Parameter(head.weight.data, requires_grad=False)
        return Joined([twin])
    return Joined([head])


class Layer:
    """One decoder layer's modules."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _project([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = _project([attention.o_proj])
        self.norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self.gate_up = _project([mlp.gate_proj, mlp.up_proj])
        self.activation, self.down = mlp.act_fn, _project([mlp.down_proj])


class Decoder:
    """The whole model as functions of flat tokens."""

    def __init__(self, model: Any, context: int) -> None:
        check_supported(model)
        lm = causal_model(model)
        config, inner = lm.config, lm.get_decoder()
        self.device, self.dtype = lm.device, lm.get_input_embeddings().weight.dtype
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_size = inner.layers[0].self_attn.head_dim
        self.scaling = inner.layers[0].self_attn.scaling
        self.vocabulary = lm.get_output_embeddings().weight.shape[0]
        self.embed, self.norm = inner.embed_tokens, inner.norm
        self.layers = [Layer(layer) for layer in inner.layers]
        self.head = _head(lm)
        positions = torch.arange(context, device=self.device)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = inner.rotary_emb(like, positions[None])
        self.cos_PD, self.sin_PD = cos[0].contiguous(), sin[0].contiguous()

    def hidden(self, ids_T: Tensor, operations: Operations, attention: Attention) -> Tensor:
        """(T, C) states before the output layer."""
        x_TC, residual_TC = self.embed(ids_T), None
        for index, layer in enumerate(self.layers):
            x_TC, residual_TC = operations.add_norm(x_TC, residual_TC, layer.input_norm)
            x_TC = layer.output(attention(index, layer.qkv(x_TC), layer.norms))
            x_TC, residual_TC = operations.add_norm(x_TC, residual_TC, layer.post_norm)
            x_TC = layer.down(operations.gate(layer.gate_up(x_TC), layer.activation))
        return operations.add_norm(x_TC, residual_TC, self.norm)[0]

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """(R, V) scores in float32."""
        return self.head(hidden_RC).float()
