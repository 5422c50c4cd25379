"""Stage 3: whole layers are gathered, with shipped sizes that suit it; loading rounds nothing but the weights."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from benchmarks.random_model import SHAPES
from finetune.memory import LIVE_PARAMETERS
from finetune.zero import gather_whole_layers, read_zero_config
from tests.conftest import OUTPUT, REPOSITORY
from tests.tiny.native import tiny_native


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_layer_is_gathered_as_a_whole_and_nothing_else(kind: str) -> None:
    from deepspeed.utils import get_z3_leaf_modules

    model = tiny_native(kind)
    gather_whole_layers(model)
    assert get_z3_leaf_modules(model) == list(model.model.layers)


@pytest.mark.parametrize("stage", ["3", "3_offload"])
def test_the_shipped_files_fetch_the_next_layer_of_a_7b_while_one_computes(stage: str) -> None:
    """With less the rest of it would be fetched when it is needed, and the card would wait for it."""
    zero = read_zero_config(f"llm_code/deepspeed_config/deepspeed_stage_{stage}_config.json")["zero_optimization"]
    shape = SHAPES["baichuan2-7b"]
    layer, last = shape.projection_parameters // shape.layers, shape.feed_forward * shape.hidden
    # DeepSpeed adds matrices until it has this many numbers.
    assert layer - last < zero["stage3_prefetch_bucket_size"] <= layer
    head = shape.vocabulary * shape.hidden
    assert 2 * layer + head < zero["stage3_max_live_parameters"] == LIVE_PARAMETERS


def test_rotary_frequencies_keep_32_bits(tiny_baichuan, tmp_path, deepspeed_kernels):
    """DeepSpeed makes what is built in its context 16-bit; transformers before 5.23 lets it do so to these too."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    launcher = (
        f"-m deepspeed.launcher.runner --quiet --num_gpus 1 --master_port {port} --no_local_rank --module".split()
    )
    flags = "--train_args_file llm_code/training_config/baichuan2_config.json --bf16 true --train_file none".split()
    flags += ["--deepspeed", "llm_code/deepspeed_config/deepspeed_stage_3_config.json"]
    flags += ["--model_name_or_path", str(tiny_baichuan), "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *launcher, "tests.loaded_buffers", *flags], cwd=REPOSITORY, env=deepspeed_kernels, **OUTPUT
    )
    assert done.returncode == 0, done.stderr
    buffers = json.loads(done.stdout.splitlines()[-1])
    config = json.loads((tiny_baichuan / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    exact = 10_000 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    found = {name: value for name, value in buffers.items() if name.endswith("inv_freq")}
    assert found
    for dtype, values in found.values():
        assert dtype == "torch.float32"
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), exact, rtol=1e-6, atol=0)
