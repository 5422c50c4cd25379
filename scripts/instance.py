"""Prepare a rented box as the walkthrough does: directories, net-tools, vim's encodings. Repeating it changes nothing.

    python3 scripts/instance.py      # make instance

Creates the directories that `.env` names, installs net-tools with apt-get where ifconfig is missing (as root or by sudo
without a password), and appends the encodings once to /etc/vim/vimrc, or to ~/.vimrc where that is not writable.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import settings  # noqa: E402

DIRECTORIES = ("BASE_MODEL_DIR", "ENVS_DIR", "QWEN_OUTPUT_DIR", "BAICHUAN_OUTPUT_DIR")
SYSTEM_PROGRAMS = ["/sbin", "/usr/sbin"]
# Files in vim show Chinese in UTF-8 and in the older GB encodings.
VIM_LINES = (
    "set fileencodings=utf-8,ucs-bom,gb18030,gbk,gb2312,cp936",
    "set termencoding=utf-8",
    "set encoding=utf-8",
)


def make_directories(names: tuple[str, ...] = DIRECTORIES) -> list[str]:
    """Create the directories of these settings; one report line each."""
    report = []
    for name in names:
        value = os.environ.get(name)
        if not value:
            report.append(f"{name} has no value: set it in .env (cp .env.example .env)")
        elif Path(value).is_dir():
            report.append(f"{value} was there")
        else:
            Path(value).mkdir(parents=True)
            report.append(f"{value} created")
    return report


def install_net_tools() -> str:
    """Install net-tools unless its ifconfig is there already."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_PROGRAMS])
    if shutil.which("ifconfig", path=path):
        return "net-tools was there"
    if not shutil.which("apt-get"):
        return "net-tools is missing, and there is no apt-get: install it with this system's package manager"
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    try:
        for arguments in (["update"], ["install", "-y", "net-tools"]):
            subprocess.run([*prefix, "apt-get", *arguments], check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "net-tools could not be installed (see above). As root: apt-get update && apt-get install net-tools"
    return "net-tools installed"


def set_vim_encodings(vimrc: Path) -> str:
    """Append those of the lines that the file does not have yet."""
    present = vimrc.read_text(encoding="utf-8", errors="replace").splitlines() if vimrc.exists() else []
    missing = [line for line in VIM_LINES if line not in present]
    if not missing:
        return f"{vimrc} had the encodings"
    with open(vimrc, "a", encoding="utf-8") as file:
        file.write("\n".join(["", '" Chinese files in UTF-8 and GB18030', *missing, ""]))
    return f"{vimrc}: encodings appended"


def default_vimrc() -> Path:
    system = Path("/etc/vim/vimrc")
    return system if os.access(system, os.W_OK) else Path.home() / ".vimrc"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vimrc", type=Path, default=default_vimrc(), help="vim settings to append to (%(default)s)")
    arguments = parser.parse_args()
    try:
        settings.load()
        report = [*make_directories(), install_net_tools(), set_vim_encodings(arguments.vimrc)]
    except settings.SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {settings.advice_on(error)}", file=sys.stderr)
        return 2
    print("\n".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
