"""AdamW with stochastic rounding: small updates count in expectation, moments follow, runs resume exactly."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from finetune.optimizers import StochasticAdamW

NUMBERS = 4096


def ones(dtype: torch.dtype, device: str = "cpu") -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(NUMBERS, dtype=dtype, device=device))


def descend(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()


def test_updates_of_a_hundred_thousandth_are_not_lost() -> None:
    """With a constant gradient AdamW moves by lr a step: 100 of 1e-5 from 1.0, where neighbours are 4e-3 apart."""
    stochastic, nearest = ones(torch.bfloat16), ones(torch.bfloat16)
    descend(StochasticAdamW([stochastic], lr=1e-5, seed=3), stochastic, 100)
    descend(torch.optim.AdamW([nearest], lr=1e-5, weight_decay=0.0), nearest, 100)
    assert (nearest == 1).all()
    # A weight is 1 or one neighbour (2^-8) below: the standard deviation of the mean is below 2^-8 * 0.5 / 64.
    assert stochastic.double().mean().item() == pytest.approx(1 - 1e-3, abs=5 * 0.44 * 2**-8 / 64)


def test_the_second_moment_follows_a_gradient_that_vanishes() -> None:
    """Rounded to the nearest, 0.999 of a bfloat16 number is the number again, and the moment would never fall."""
    weight = ones(torch.bfloat16)
    optimizer = StochasticAdamW([weight], lr=0.0, seed=5)
    descend(optimizer, weight, 1)
    before = optimizer.state[weight]["exp_avg_sq"].double().mean()
    for _ in range(300):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    after = optimizer.state[weight]["exp_avg_sq"].double().mean()
    assert (after / before).item() == pytest.approx(0.999**300, rel=0.02)


def test_in_32_bits_it_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(50, 7))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    pairs = [(ours, StochasticAdamW([ours], **settings)), (theirs, torch.optim.AdamW([theirs], **settings))]
    for step in range(20):
        for weight, optimizer in pairs:
            weight.grad = torch.randn(50, 7, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_pieces_do_not_change_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import optimizers

    results = []
    for size in (1 << 24, 1000):
        monkeypatch.setattr(optimizers, "MAX_ELEMENTS", size)
        weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, NUMBERS))
        descend(StochasticAdamW([weight], lr=1e-2), weight, 3)
        results.append(weight.detach())
    assert torch.equal(*results)


def tiny_model() -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    found = []
    for step in steps:
        ids = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(step % 4))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_losses_follow_a_run_with_32_bit_master_weights_where_nearest_rounding_does_not() -> None:
    """bfloat16 throughout against the same forward passes with fp32 master weights and moments."""
    steps, rate = range(120), 1e-4
    master, twin = tiny_model(), tiny_model().to(torch.bfloat16)
    optimizer, reference = torch.optim.AdamW(master.parameters(), lr=rate, weight_decay=0.0), []
    for step in steps:
        for wide, narrow in zip(master.parameters(), twin.parameters(), strict=True):
            narrow.data.copy_(wide.data)
        ids = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(step % 4))
        loss = twin(input_ids=ids, labels=ids).loss
        loss.backward()
        for wide, narrow in zip(master.parameters(), twin.parameters(), strict=True):
            wide.grad, narrow.grad = narrow.grad.float(), None
        optimizer.step()
        reference.append(loss.item())
    ours, nearest = tiny_model().to(torch.bfloat16), tiny_model().to(torch.bfloat16)
    found = losses(ours, StochasticAdamW(ours.parameters(), lr=rate, seed=1), steps)
    lost = losses(nearest, torch.optim.AdamW(nearest.parameters(), lr=rate, weight_decay=0.0), steps)
    fall = reference[0] - sum(reference[-4:]) / 4
    error = abs(sum(found[-4:]) - sum(reference[-4:])) / 4
    assert fall > 0.1
    assert error < 0.04 * fall
    assert abs(sum(lost[-4:]) - sum(reference[-4:])) / 4 > 3 * error


def test_a_resumed_run_draws_the_same_numbers(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    optimizer = StochasticAdamW(model.parameters(), lr=1e-3, seed=9)
    losses(model, optimizer, range(5))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    rest = losses(model, optimizer, range(5, 10))
    torch.manual_seed(12345)
    resumed = tiny_model().to(torch.bfloat16)
    other = StochasticAdamW(resumed.parameters(), lr=1e-3, seed=9)
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert losses(resumed, other, range(5, 10)) == rest
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_another_seed_draws_other_numbers() -> None:
    weights = [ones(torch.bfloat16) for _ in range(3)]
    for weight, seed in zip(weights, (1, 1, 2), strict=True):
        descend(StochasticAdamW([weight], lr=1e-3, seed=seed), weight, 1)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_kernel_does_what_the_definition_says() -> None:
    """From the same state both round the same 32-bit numbers: to one of two neighbours, equal in the mean."""
    from finetune import optimizers

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1 << 22, device="cuda").bfloat16())
    twin = copy.deepcopy(weight)
    by_kernel, by_definition = (StochasticAdamW([w], lr=1e-3, weight_decay=0.1, seed=4) for w in (weight, twin))
    assert optimizers.adamw_kernel() is not None
    for _ in range(3):
        grad = torch.randn_like(weight) * 1e-2
        weight.grad, twin.grad = grad, grad.clone()
        by_kernel.step()
        kernel, optimizers.adamw_kernel = optimizers.adamw_kernel, lambda: None
        by_definition.step()
        optimizers.adamw_kernel = kernel
        mine, its = by_kernel.state[weight], by_definition.state[twin]
        for ours, theirs in [
            (weight.data, twin.data),
            *((mine[name], its[name]) for name in ("exp_avg", "exp_avg_sq")),
        ]:
            difference = (ours.double() - theirs.double()).abs()
            # Neighbours in bfloat16 are at most 2^-7 of the larger one apart; where terms cancel, fp32 rounds too.
            size = theirs.double().abs().maximum(ours.double().abs())
            assert (difference <= 1.01 * 2**-7 * size + 1e-6 * size.max()).all()
            mean = theirs.double().abs().mean().item()
            assert ours.double().abs().mean().item() == pytest.approx(mean, rel=1e-4)
            if ours is weight.data:
                assert not torch.equal(ours, theirs)  # other random numbers
            theirs.copy_(ours)  # or roundings of one step would be magnified where terms of the next cancel
