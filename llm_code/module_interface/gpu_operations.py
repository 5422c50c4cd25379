"""Operations for a GPU: Triton's and PyTorch's kernels, each where it agrees with the plain definition here and now.

Every candidate made for the model's dtype runs once on random numbers of its shapes; one that fails to build, or
differs by more than rounding, is left out with a warning. A decoding step can be captured once its attention needs
nothing from the host.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_code.module_interface.decoder import Decoder
from llm_code.module_interface.operations import Operations, Segment

log = logging.getLogger(__name__)
HALVES = (torch.float16, torch.bfloat16)  # the dtypes that PyTorch's flash attention is made for
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest value


class FlashSegments:
    """Segments of a step as the tensors that PyTorch's flash attention takes."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        borders = [0, *(segment.end for segment in segments)]
        starts = [*(segment.start for segment in segments), 0]
        lengths = [segment.length for segment in segments]
        flat = torch.tensor([*borders, *starts, *lengths], dtype=torch.int32)
        flat = flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat
        self.borders, self.starts, self.lengths = flat.split([len(borders), len(starts), len(lengths)])
        self.longest_query = max(segment.end - segment.begin for segment in segments)
        self.longest = max(lengths)


def _flash(
    q_THD: Tensor,
    keys_values: Tensor,
    borders: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest_query: int,
    longest: int,
    scaling: float,
) -> Tensor:
    """Causal attention of each request's last tokens; its keys are `lengths` tokens from `starts` on."""
    return torch.ops.aten._flash_attention_forward(
        q_THD,
        keys_values[0],
        keys_values[1],
        borders,
        starts,
        longest_query,
        longest,
        0.0,
        True,
        False,
        scale=scaling,
        seqused_k=lengths,
    )[0]


def flash_prefill(q_THD: Tensor, keys_values: Tensor, segments: FlashSegments, scaling: float) -> Tensor:
    """Operations.attend_prefill by PyTorch's flash attention."""
    where = (segments.borders, segments.starts, segments.lengths)
    return _flash(q_THD, keys_values, *where, segments.longest_query, segments.longest, scaling)


def flash_decode(
    q_BHD: Tensor, keys_values: Tensor, starts_B: Tensor, lengths_B: Tensor, places: Any, scaling: float
) -> Tensor:
    """Operations.attend_decode by PyTorch's flash attention."""
    rows = q_BHD.shape[0]
    borders = torch.arange(rows + 1, dtype=torch.int32, device=q_BHD.device)
    starts = torch.cat([starts_B, starts_B[:1]]).int()
    return _flash(q_BHD.contiguous(), keys_values, borders, starts, lengths_B.int(), 1, keys_values.shape[1], scaling)


class GpuOperations(Operations):
    """The plain operations, some of them replaced by `choose`."""

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}

    @property
    def can_capture(self) -> bool:
        return "attend_decode" in self.chosen

    def plan_segments(self, segments: Sequence[Segment], device: torch.device) -> Any:
        """What attend_prefill takes: tensors for flash attention, or the segments themselves."""
        return FlashSegments(segments, device) if "attend_prefill" in self.chosen else segments

    def use(self, name: str, function: Callable[..., Any]) -> None:
        """Replace an operation."""
        setattr(self, name, function)
        self.chosen[name] = f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"


def choose_operations(decoder: Decoder) -> GpuOperations:
    """The fastest operations that agree with the plain ones on this machine and this model's shapes."""
    operations, plain, trials = GpuOperations(), Operations(), Trials(decoder)
    for name, functions in candidates_for(decoder.dtype).items():
        for function in functions:
            if problem := trials.problem(name, function, getattr(plain, name)):
                log.warning("%s.%s is not used: %s", function.__module__, function.__name__, problem)
                continue
            operations.use(name, function)
            break
    return operations


def candidates_for(dtype: torch.dtype) -> dict[str, list[Callable[..., Any]]]:
    """By operation, the kernels made for this dtype, the fastest first."""
    flash = {"attend_prefill": [flash_prefill], "attend_decode": [flash_decode]} if dtype in HALVES else {}
    try:
        from llm_code.module_interface import kernels
    except ImportError as error:
        log.warning("no Triton kernels: %s", error)
        return flash
    names = ("attend_decode", "add_norm", "gate", "rotate_and_store")
    return flash | {name: [getattr(kernels, name), *flash.get(name, ())] for name in names}


class Trials:
    """Random inputs of a model's shapes, the same for the plain function and its candidate."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.generator = torch.Generator(self.device).manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.decoder.dtype)

    @torch.inference_mode()
    def problem(self, name: str, candidate: Callable[..., Any], plain: Callable[..., Any]) -> str | None:
        """Why the candidate cannot be used, or None."""
        inputs, tolerance = getattr(self, f"_{name}")(), TOLERANCE.get(self.decoder.dtype, 0.0)
        for plain_inputs, candidate_inputs in inputs:
            try:
                expected = [*_tensors(plain(*plain_inputs)), *_pools(plain_inputs)]
                found = [*_tensors(candidate(*candidate_inputs)), *_pools(candidate_inputs)]
            except Exception as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for one, other in zip(expected, found, strict=True):
                difference = (one.float() - other.float()).abs().max() / one.float().abs().max()
                if not difference <= tolerance:
                    return f"it differs by {float(difference):.1e} of the largest value"
        return None

    def _add_norm(self) -> list:
        norm = self.decoder.layers[0].input_norm
        x, residual = self.random(5, norm.weight.shape[0]), self.random(5, norm.weight.shape[0])
        return [((x, None, norm),) * 2, ((x, residual, norm),) * 2]

    def _gate(self) -> list:
        return [((self.random(5, 2 * 1376), self.decoder.layers[0].activation),) * 2]

    def _pool(self) -> Tensor:
        return self.random(2, 1024, self.decoder.num_kv_heads, self.decoder.head_size)

    def _rotate_and_store(self) -> list:
        decoder = self.decoder
        qkv = self.random(6, decoder.num_heads + 2 * decoder.num_kv_heads, decoder.head_size)
        angles = [self.random(6, decoder.head_size) for _ in range(2)]
        places = torch.tensor([7, 3, 400, 401, 1000, 0], device=self.device)
        pool = self._pool()
        norms = decoder.layers[0].norms
        return [tuple((qkv, decoder.num_heads, norms, *angles, pool.clone(), places) for _ in range(2))]

    def _attend_decode(self) -> list:
        places = [(16, 1), (32, 333), (0, 17), (512, 512), (100, 64)]
        cases = []
        for rows in (1, 5):
            query = self.random(rows, self.decoder.num_heads, self.decoder.head_size)
            starts, lengths = (torch.tensor(x, device=self.device) for x in zip(*places[-rows:], strict=True))
            case = (query, self._pool(), starts, lengths, places[-rows:], self.decoder.scaling)
            cases.append((case, case))
        return cases

    def _attend_prefill(self) -> list:
        segments = [Segment(0, 5, 16, 5), Segment(5, 6, 300, 77), Segment(6, 46, 512, 200), Segment(46, 110, 64, 64)]
        query, pool = self.random(110, self.decoder.num_heads, self.decoder.head_size), self._pool()
        flash = FlashSegments(segments, self.device)
        scaling = self.decoder.scaling
        return [((query, pool, segments, scaling), (query, pool, flash, scaling))]


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _pools(inputs: tuple) -> list[Tensor]:
    """The cache among the inputs, which operations may write to."""
    return [x for x in inputs if isinstance(x, Tensor) and x.dim() == 4]
