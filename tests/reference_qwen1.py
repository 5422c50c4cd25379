"""An independent forward pass of Qwen-1 in plain torch, on the original state dict, for sequences up to seq_length.

Written from the published description: RMSNorm, one fused query-key-value projection with bias, rotary positions on
half-split heads, causal softmax attention, and w1(x) * silu(w2(x)) projected back.
Shapes: T tokens, H hidden, N heads, D head size, V vocabulary.
"""

import json
from pathlib import Path

import torch


def read_state(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All tensors of a folder of .safetensors or .bin shards."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        state |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    return weight_H * x_TH / torch.sqrt((x_TH * x_TH).mean(dim=-1, keepdim=True) + eps)


def rotate(x_TND: torch.Tensor, base: float) -> torch.Tensor:
    """Turn the pair (i, i + D/2) of every head at position t by the angle t / base^(2i/D)."""
    T, _, D = x_TND.shape
    angles = torch.arange(T, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    cos, sin = (f(angles).to(x_TND.dtype)[:, None, :] for f in (torch.cos, torch.sin))
    first, second = x_TND[..., : D // 2], x_TND[..., D // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor) -> torch.Tensor:
    """Causal attention, heads one after another; (T, N * D)."""
    T, N, D = q_TND.shape
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = []
    for n in range(N):
        scores_TT = q_TND[:, n] @ k_TND[:, n].T / D**0.5
        heads.append(torch.softmax(scores_TT.masked_fill(future, float("-inf")), dim=-1) @ v_TND[:, n])
    return torch.cat(heads, dim=-1)


def qwen1_logits(folder: Path, ids_T: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of the checkpoint in its original layout."""
    config = json.loads((folder / "config.json").read_text())
    state, eps = read_state(folder), config["layer_norm_epsilon"]
    heads = (len(ids_T), config["num_attention_heads"], config["kv_channels"])
    x_TH = state["transformer.wte.weight"][ids_T]
    for layer in range(config["num_hidden_layers"]):
        w = {n.split(".", 3)[3]: t for n, t in state.items() if n.startswith(f"transformer.h.{layer}.")}
        h_TH = rms_norm(x_TH, w["ln_1.weight"], eps)
        q, k, v = (h_TH @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]).view(len(ids_T), 3, -1).unbind(1)
        q, k = (rotate(part.reshape(heads), config["rotary_emb_base"]) for part in (q, k))
        x_TH = x_TH + attend(q, k, v.reshape(heads)) @ w["attn.c_proj.weight"].T
        h_TH = rms_norm(x_TH, w["ln_2.weight"], eps)
        gate = h_TH @ w["mlp.w2.weight"].T
        x_TH = x_TH + (h_TH @ w["mlp.w1.weight"].T * gate * torch.sigmoid(gate)) @ w["mlp.c_proj.weight"].T
    return rms_norm(x_TH, state["transformer.ln_f.weight"], eps) @ state["lm_head.weight"].T
