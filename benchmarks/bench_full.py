"""Full-parameter training alone: `python -m benchmarks.bench_train FOLDER --only full`, further flags behind it.

python -m benchmarks.bench_full FOLDER [--size tiny] [--per_device_train_batch_size 16 ...]
"""

import sys

from benchmarks.bench_train import main
from finetune.errors import run_main

if __name__ == "__main__":
    run_main(lambda: main([*sys.argv[1:], "--only", "full"]))
