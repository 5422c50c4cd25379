"""Download Qwen-14B-Chat (or any model) and make it a native checkpoint.

    python -m qwen_qlora.qwen_download --model_id qwen/Qwen-14B-Chat --revision v1.0.8 --source modelscope \\
        --download_dir DIR --model_dir DIR [--keep_original 0|1]

`make qwen-download` runs it with the values of .env. The flow is finetune/download.py's.
"""

from finetune.download import download_model, parse_arguments
from finetune.errors import run_main


def main() -> None:
    print(download_model(parse_arguments(__doc__)))


if __name__ == "__main__":
    run_main(main)
