"""Proof of a merge: fresh processes compute logits of base + adapter and of the merged model, one after the other.

    python -m finetune.merge_check MODEL OUTPUT.safetensors [--adapter_name_or_path ADAPTER]

writes the logits of a few prompts; check_merge starts it twice and compares. Never are both models in memory. Where one
is larger than the card (a 14B of 28 GB, trained in 4 bit on 24 GB), both run on the CPU.
Shapes: T tokens of all prompts together, V vocabulary.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune.errors import UserError, run_main
from finetune.tensor_files import shard_files

PROMPTS = (
    "你好，请介绍一下你自己。",
    "判断下面两句话的意思是否相同：\n怎么办理退款\n如何退钱",
    "What is the capital of France?",
)
# relative root mean square: rounding alone stays an order of magnitude below, a forgotten adapter does not
LIMITS = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.05}
REPOSITORY = Path(__file__).resolve().parent.parent
BESIDE_WEIGHTS = 10**9  # bytes on the card for the prompts' activations and logits, and cuBLAS
# A process of its own: the CUDA context of this one would stay on the card beside the models.
FREE_MEMORY = "import torch; print(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else '')"


def checkpoint_dtype(model_dir: Path) -> str:
    """The dtype the checkpoint is stored in, as torch calls it."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in LIMITS else "float32"


def compute_logits(model_dir: Path, adapter_dir: Path | None, output: Path) -> None:
    """Write token_ids, logits (T, V) and, with an adapter, the logits of the bare base model."""
    import contextlib

    import torch
    from safetensors.torch import save_file

    from finetune.conversation import encode_prompt
    from finetune.models import load_for_inference

    model, tokenizer = load_for_inference(model_dir, adapter_dir, dtype=checkpoint_dtype(model_dir))
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]

    @torch.inference_mode()
    def logits_TV() -> torch.Tensor:
        rows = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts]
        return torch.cat(rows)

    results = {"token_ids": torch.tensor([i for ids in prompts for i in ids]), "logits": logits_TV()}
    with model.disable_adapter() if adapter_dir else contextlib.nullcontext():
        if adapter_dir:
            results["base_logits"] = logits_TV()
    save_file(results, output)


def free_card_bytes() -> int | None:
    """Free memory of the first visible card, None without one."""
    done = subprocess.run([sys.executable, "-c", FREE_MEMORY], capture_output=True, text=True)
    return int(done.stdout) if done.stdout.strip().isdecimal() else None


def _is_larger_than_card(model_dir: Path, adapter_dir: Path) -> bool:
    """Whether base + adapter don't fit; says so."""
    free = free_card_bytes()
    needed = sum(file.stat().st_size for file in [*shard_files(model_dir), *adapter_dir.glob("adapter_model.*")])
    if free is None or needed + BESIDE_WEIGHTS <= free:
        return False
    print(
        f"-----> checking on the CPU, which takes minutes and {needed / 1e9:.1f} GB of main memory: "
        f"the card has {free / 1e9:.1f} GB free"
    )
    return True


def _fresh_process(arguments: list[str], on_cpu: bool) -> None:
    command = [sys.executable, "-m", "finetune.merge_check", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"} if on_cpu else None
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        raise UserError("checking the merge was killed, as happens when main memory runs out. Free some and run again.")
    if done.returncode:
        raise UserError(f"checking the merge failed: {' '.join(command)}\n{done.stderr[-2000:]}")


def compare(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Differences between the logits of base + adapter (`expected`) and of the merged model."""
    if expected["token_ids"].tolist() != found["token_ids"].tolist():
        raise UserError("the merged model's tokenizer gives other token ids than the base model's.")
    want, have, base = expected["logits"], found["logits"], expected["base_logits"]
    spread = (want - want.mean()).square().mean().sqrt()
    return {
        "max_abs_difference": float((want - have).abs().max()),
        "relative_rms_difference": float((want - have).square().mean().sqrt() / spread),
        "argmax_agreement": float((want.argmax(-1) == have.argmax(-1)).float().mean()),
        "adapter_max_abs_effect": float((want - base).abs().max()),
        "tokens": int(want.shape[0]),
    }


def check_merge(model_dir: Path, adapter_dir: Path, merged_dir: Path) -> dict[str, Any]:
    """Compare, print and return the differences. Raises UserError when they are more than rounding."""
    from safetensors.torch import load_file

    dtype = checkpoint_dtype(model_dir)
    print(f"-----> loading base + adapter, then the merged model, each in a fresh process, {dtype}")
    on_cpu = _is_larger_than_card(model_dir, adapter_dir)
    with tempfile.TemporaryDirectory() as folder:
        expected, found = Path(folder, "adapter.safetensors"), Path(folder, "merged.safetensors")
        adapter = ["--adapter_name_or_path", str(adapter_dir.resolve())]
        _fresh_process([str(model_dir.resolve()), str(expected), *adapter], on_cpu)
        _fresh_process([str(merged_dir.resolve()), str(found)], on_cpu)
        result = compare(load_file(expected), load_file(found))
    require_rounding_only(result, dtype, merged_dir)
    return {"dtype": dtype, **result}


def require_rounding_only(result: dict[str, float], dtype: str, merged_dir: Path) -> None:
    """Print the differences. Raises UserError when they are more than the dtype's rounding explains."""
    print(
        f"merged against base + adapter over {result['tokens']} tokens: max abs difference "
        f"{result['max_abs_difference']:.3g}, argmax agreement {100 * result['argmax_agreement']:.1f} %, relative rms "
        f"{result['relative_rms_difference']:.2g} (the adapter itself moves logits by up to "
        f"{result['adapter_max_abs_effect']:.3g})"
    )
    if result["adapter_max_abs_effect"] <= 2 * result["max_abs_difference"]:
        print(f"note: the adapter changes these logits less than {dtype} rounding does, so they tell little about it")
    if not result["relative_rms_difference"] <= LIMITS[dtype]:
        raise UserError(
            f"the merged model differs from base + adapter by more than {dtype} rounding (relative rms limit "
            f"{LIMITS[dtype]:g}); it stays in {merged_dir} and is not marked as done. "
            f"To merge again: rm -r {merged_dir}"
        )


def main() -> None:
    """Compute the logits of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_name_or_path", type=Path)
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--adapter_name_or_path", type=Path)
    args = parser.parse_args()
    compute_logits(args.model_name_or_path, args.adapter_name_or_path, args.output)


if __name__ == "__main__":
    run_main(main)
