"""Download Baichuan2-7B-Chat (or any model) and make it a native checkpoint.

    python -m llm_code.llm_download.baichuan2_7B_base_download --model_id baichuan-inc/Baichuan2-7B-Chat \\
        --revision v1.0.2 --source modelscope --download_dir DIR --model_dir DIR [--keep_original 0|1]

`make baichuan-download` runs it with the values of .env. The flow is finetune/download.py's.
"""

from finetune.download import download_model, parse_arguments
from finetune.errors import run_main


def main() -> None:
    print(download_model(parse_arguments(__doc__)))


if __name__ == "__main__":
    run_main(main)
