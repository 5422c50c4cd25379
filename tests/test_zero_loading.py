"""What ZeRO-3 makes of a model while it is loaded, beside the arithmetic."""

import json
import socket
import subprocess
import sys

import torch

from tests.conftest import OUTPUT, REPOSITORY


def test_rotary_frequencies_keep_32_bits(tiny_baichuan, tmp_path):
    """DeepSpeed makes what is built in its context 16-bit; transformers before 5.23 lets it do so to these too."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    launcher = (
        f"-m deepspeed.launcher.runner --quiet --num_gpus 1 --master_port {port} --no_local_rank --module".split()
    )
    flags = "--train_args_file llm_code/training_config/baichuan2_config.json --bf16 true --train_file none".split()
    flags += ["--deepspeed", "llm_code/deepspeed_config/deepspeed_stage_3_config.json"]
    flags += ["--model_name_or_path", str(tiny_baichuan), "--output_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, *launcher, "tests.loaded_buffers", *flags], cwd=REPOSITORY, **OUTPUT)
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
