"""Triton kernels of the QLoRA path and its FP8 products on a GPU, against plain PyTorch; refusals everywhere."""

import pytest
import torch

from benchmarks.small_terms import kept, ours
from finetune.errors import UserError
from finetune.frozen import FP8_LARGEST, Frozen, check_fp8
from finetune.nf4 import dense_weight
from finetune.projection import Group, Projections

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_fp8_needs_a_card_that_has_it():
    with pytest.raises(UserError, match="Ada or Hopper.*found a CPU"):
        check_fp8(torch.device("cpu"))


def test_what_is_not_double_quantised_nf4_keeps_16_bit_products():
    assert Frozen(torch.nn.Linear(64, 64), fp8_backward=True).scale is None


def quantised_layer(inputs: int, outputs: int) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(inputs, outputs, True, torch.bfloat16, True, "nf4")
    return layer.to(torch.bfloat16).cuda().requires_grad_(False)


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("inputs, outputs", [(5120, 13696), (13696, 5120)])
    def test_terms_below_the_last_place_are_kept(self, inputs, outputs):
        base = quantised_layer(inputs, outputs)
        assert kept(ours, base, 4096, 2.5e-5) == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("shape", [(1, 7), (33, 192), (300, 5120)])
    def test_dropout(self, shape):
        from finetune.kernels import seeded_dropout

        x = torch.randn(shape, device="cuda").bfloat16() + 10
        out = seeded_dropout(x, 6554, 65536 / (65536 - 6554), 3)
        kept = out != 0
        expected = (x.float() * (65536 / (65536 - 6554))).bfloat16()
        assert torch.equal(out[kept], expected[kept]) and torch.equal(
            out, seeded_dropout(x, 6554, 65536 / (65536 - 6554), 3)
        )
        if x.numel() > 10**6:
            assert kept.float().mean().item() == pytest.approx(0.9, abs=0.002)
            # Neighbours along both axes, and 512 apart (one draw decides about both), are independent.
            bits, flat = kept.float(), kept.float().flatten()
            pairs = [bits[1:] * bits[:-1], bits[:, 1:] * bits[:, :-1], flat[512:] * flat[:-512]]
            assert all(pair.mean().item() == pytest.approx(0.81, abs=0.003) for pair in pairs)

    @pytest.mark.parametrize("size", [64, 5120, 13696])
    @pytest.mark.parametrize("num_parts", [1, 2, 3])
    def test_rows(self, size, num_parts):
        from finetune.kernels import rows_to_fp8

        parts = [torch.randn(37, width, device="cuda").bfloat16() for width in (size, 192, size)[:num_parts]]
        x = torch.cat(parts, 1)
        for part in (x, *parts):
            part[3] = 0
        codes, scales = rows_to_fp8(parts)
        expected = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_LARGEST
        torch.testing.assert_close(scales, expected)
        assert torch.equal(codes.float(), (x.float() / scales).to(torch.float8_e4m3fn).float())

    @pytest.mark.parametrize("inputs, outputs", [(64, 64), (192, 320), (5120, 1024)])
    def test_weights(self, inputs, outputs):
        from finetune.kernels import nf4_to_dense

        layer = quantised_layer(inputs, outputs)
        scale = Frozen(layer, fp8_backward=True).scale
        straight = torch.empty(outputs, inputs, device="cuda", dtype=torch.float8_e4m3fn)
        # Columns of a wider matrix; what lies beside them stays.
        wide = torch.full((inputs, outputs + 64), 7.0, device="cuda").to(torch.float8_e4m3fn)
        nf4_to_dense(layer.weight, straight, scale)
        nf4_to_dense(layer.weight, wide[:, 32:-32], scale, transposed=True)
        transposed, beside = wide[:, 32:-32], torch.cat([wide[:, :32], wide[:, -32:]], 1)
        assert torch.equal(straight.float(), transposed.float().T) and (beside.float() == 7).all()
        exact = dense_weight(layer, torch.float32)
        error = (straight.float() * scale - exact).norm() / exact.norm()
        assert error < 0.03
        assert straight.float().abs().max().item() == FP8_LARGEST
        dense = nf4_to_dense(layer.weight, torch.empty(outputs, inputs, device="cuda", dtype=torch.bfloat16))
        torch.testing.assert_close(dense, dense_weight(layer, torch.bfloat16), rtol=2**-7, atol=0)

    @pytest.mark.parametrize("rate", [0.0, 0.1])
    def test_projections_with_an_fp8_backward_pass(self, rate):
        """The backward pass within the rounding of FP8 of 16-bit products, the forward pass equal."""
        layers = [quantised_layer(512, 1024), quantised_layer(512, 256)]
        x = torch.randn(300, 512, device="cuda").bfloat16().requires_grad_()
        a = [torch.randn(8, 512, device="cuda").div_(23).requires_grad_() for _ in layers]
        b = [torch.randn(layer.out_features, 8, device="cuda").requires_grad_() for layer in layers]
        results = []
        for fp8 in (False, True):
            group = Group([Frozen(layer, fp8) for layer in layers], 0.2, rate)
            assert group.fp8_backward == fp8
            torch.manual_seed(1)
            outputs = Projections.apply(x, group, *a, *b)
            torch.manual_seed(2)
            loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, [x, *a, *b])])
        assert all(map(torch.equal, results[0][:2], results[1][:2]))
        for exact, rounded in zip(*results, strict=True):
            assert (rounded - exact).float().norm() < 0.06 * exact.float().norm()

    @pytest.mark.parametrize("size", [64, 4096])
    def test_unit_rows_and_their_gradient(self, size):
        from finetune.loss import UnitRows

        weight = torch.randn(300, size, device="cuda").bfloat16()
        weight[5] = 0
        weight.requires_grad_()
        exact = weight.detach().double().requires_grad_()
        grad = torch.randn(300, size, device="cuda").bfloat16()
        unit, expected = UnitRows.apply(weight), torch.nn.functional.normalize(exact)
        assert (unit - expected).norm() < 3e-3 * expected.norm()
        rows = torch.arange(300, device="cuda") != 5  # the zero row's gradient is 1e12 times the incoming one
        (found,) = torch.autograd.grad(unit, weight, grad.clone())
        (wanted,) = torch.autograd.grad(expected, exact, grad.double())
        assert (found - wanted)[rows].norm() < 4e-3 * wanted[rows].norm()
        torch.testing.assert_close(found[5].double(), wanted[5], rtol=1e-2, atol=0)

    def test_the_normalised_heads_loss_and_gradients(self):
        """The kernels on unit rows against the chunked definition in float32."""
        from finetune.loss import UnitRows, summed_cross_entropy

        hidden = torch.randn(500, 256, device="cuda").bfloat16()
        weight = torch.randn(3000, 256, device="cuda").bfloat16()
        targets = torch.randint(0, 3000, (500,), device="cuda")
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        exact = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
        loss = summed_cross_entropy(leaves[0], UnitRows.apply(leaves[1]), targets, 128)
        expected = summed_cross_entropy(*exact, targets, 128, normalize=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        wanted = torch.autograd.grad(expected, exact)
        for found, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            assert (found - want).norm() < 0.02 * want.norm()

    @pytest.mark.parametrize("size", [1000, 152064])
    def test_cross_entropy(self, size):
        from finetune.kernels import cross_entropy_

        logits = (torch.randn(70, size, device="cuda") * 5).bfloat16()
        targets = torch.randint(0, size, (70,), device="cuda")
        exact = logits.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
        (wanted,) = torch.autograd.grad(expected, exact)
        loss, gradient = cross_entropy_(logits, targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and gradient is logits
        assert (gradient - wanted).norm() < 3e-3 * wanted.norm()
