"""What both projects share: checkpoints, chat encoding, batching, QLoRA, training, generation."""

import sys

if sys.version_info < (3, 10):  # a plan runs on the box's own python3 where no environment is installed yet
    found = ".".join(map(str, sys.version_info[:2]))
    print(
        f"error: expected Python 3.10 or newer, found {found}. Install the environment, which brings its own: "
        "make qwen-env or make baichuan-env",
        file=sys.stderr,
    )
    sys.exit(2)
