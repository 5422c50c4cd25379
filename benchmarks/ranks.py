"""The command of a training: one process, or a rank for each of several cards, as the shipped scripts start them."""

import socket
import sys


def training_command(module: str, gpus: int = 1, has_zero: bool = False) -> list[str]:
    """What stands before the flags of `module`: for ZeRO DeepSpeed's launcher, else for several cards torchrun."""
    python = [sys.executable, "-m"]
    if has_zero:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        launcher = ["deepspeed.launcher.runner", "--quiet", "--num_gpus", str(gpus), "--master_port", port]
        return [*python, "finetune.launch", *python, *launcher, "--no_local_rank", "--module", module]
    if gpus > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        return [*python, "finetune.launch", *python, *launcher, "-m", module]
    return [*python, module]
