"""An independent forward pass of Baichuan2-7B in plain torch, on the original state dict.

RMSNorm, one fused projection W_pack without bias, rotary positions, causal attention, silu(gate) * up, and NormHead:
the logits are products with the head's rows divided by their L2 norms. Shapes: T tokens, H hidden, V vocabulary.
"""

import json
from pathlib import Path

import torch

from tests.reference_qwen1 import attend, read_state, rms_norm, rotate


def baichuan2_logits(folder: Path, ids_T: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of the checkpoint in its original layout."""
    config = json.loads((folder / "config.json").read_text())
    state, eps, N = read_state(folder), config["rms_norm_eps"], config["num_attention_heads"]
    heads = (len(ids_T), N, config["hidden_size"] // N)
    x_TH = state["model.embed_tokens.weight"][ids_T]
    for layer in range(config["num_hidden_layers"]):
        w = {n.split(".", 3)[3]: t for n, t in state.items() if n.startswith(f"model.layers.{layer}.")}
        h_TH = rms_norm(x_TH, w["input_layernorm.weight"], eps)
        q, k, v = (h_TH @ w["self_attn.W_pack.weight"].T).chunk(3, dim=-1)
        q, k = (rotate(part.reshape(heads), 10000.0) for part in (q, k))
        x_TH = x_TH + attend(q, k, v.reshape(heads)) @ w["self_attn.o_proj.weight"].T
        h_TH = rms_norm(x_TH, w["post_attention_layernorm.weight"], eps)
        gate = h_TH @ w["mlp.gate_proj.weight"].T
        x_TH = x_TH + (gate * torch.sigmoid(gate) * (h_TH @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    head_VH = state["lm_head.weight"]
    head_VH = head_VH / head_VH.square().sum(dim=-1, keepdim=True).sqrt()
    return rms_norm(x_TH, state["model.norm.weight"], eps) @ head_VH.T
