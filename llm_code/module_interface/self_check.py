"""Before the first request: does the engine's decoder compute what the model's own forward does, on this machine?"""

from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.generate import causal_model
from llm_code.module_interface.operations import Segment
from llm_code.module_interface.runner import Runner, StepAttention

NUM_TOKENS = 12
# Of the largest score: float32 differs in the last bits, 16-bit numbers by the roundings of all layers, which grow with
# depth. A wrong rotation, mask or scale differs by about 1.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_16_BIT = 0.2


def check_decoder(model: Any, runner: Runner) -> None:
    """Compare the scores of a few tokens, prefilled and decoded. Raises UserError when they differ."""
    lm = causal_model(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, runner.decoder.vocabulary, (NUM_TOKENS,), generator=generator).to(runner.device)
    with torch.inference_mode():
        expected_TV = lm(input_ids=ids[None], use_cache=False).logits[0].float()
        prefilled = _scores(runner, ids, 0, NUM_TOKENS - 1)
        found_TV = torch.cat([prefilled, _scores(runner, ids, NUM_TOKENS - 1, NUM_TOKENS)])
    difference = float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())
    if not difference <= TOLERANCE.get(runner.decoder.dtype, TOLERANCE_16_BIT) and expected_TV.isfinite().all():
        raise UserError(
            f"the local engine computes something else than this {lm.config.model_type} model itself: scores differ by "
            f"{difference:.2g} of the largest. Serve it with ENGINE=vllm."
        )


def _scores(runner: Runner, ids: Tensor, begin: int, end: int) -> Tensor:
    """Scores of tokens begin .. end - 1, written to the beginning of the cache; a single one as a decoding row."""
    positions = torch.arange(begin, end, device=runner.device)
    decodes = end - begin == 1
    attention = StepAttention(runner, positions, positions, int(decodes))
    if decodes:
        attention.host_places = [(0, end)]
    else:
        attention.segments = runner.operations.plan_segments([Segment(0, end - begin, 0, end)], runner.device)
    return runner.decoder.logits(runner.decoder.hidden(ids[begin:end], runner.operations, attention))
