"""run_main: exit codes and what reaches stderr."""

import pytest

from finetune.errors import UserError, run_main


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "text"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("expected 1, got 2")), 2, "error: expected 1, got 2\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_exit_status_and_message(main, status, text, capsys):
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == status
    assert capsys.readouterr().err == text


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()))
