"""Finished batches on disk: what a run with other settings does to them."""

from finetune.partial_results import PartialResults

FULL, QUICK = {"model": "m", "limit": None}, {"model": "m", "limit": 20}


def opened(path, config):
    partial = PartialResults(path, config)
    partial.close()
    return partial.batches


def test_a_run_with_other_settings_loses_no_batch(tmp_path, capsys):
    path = tmp_path / "partial.jsonl"
    full = PartialResults(path, FULL)
    full.append(0, [[0, "a"]])
    full.append(3, [[1, "b"]])
    full.close()
    quick = PartialResults(path, QUICK)
    assert quick.batches == {} and "set aside, it is of a run with other limit" in capsys.readouterr().err
    quick.append(0, [[0, "c"]])
    quick.close()
    assert opened(path, FULL) == {0: [[0, "a"]], 3: [[1, "b"]]}
    assert opened(path, QUICK) == {0: [[0, "c"]]}
    finished = PartialResults(path, QUICK)
    finished.remove()
    assert opened(path, FULL) == {0: [[0, "a"]], 3: [[1, "b"]]}
    assert [file.name for file in tmp_path.iterdir()] == ["partial.jsonl"]


def test_a_run_without_batches_leaves_nothing_behind(tmp_path, capsys):
    assert opened(tmp_path / "partial.jsonl", FULL) == {} == opened(tmp_path / "partial.jsonl", QUICK)
    assert [file.name for file in tmp_path.iterdir()] == ["partial.jsonl"] and not capsys.readouterr().err


def test_a_finished_batch_is_in_the_file_at_once(tmp_path):
    """A killed process writes nothing more."""
    partial = PartialResults(tmp_path / "partial.jsonl", FULL)
    partial.append(0, [[0, "a"]])
    assert len((tmp_path / "partial.jsonl").read_bytes().splitlines()) == 2
    partial.close()


def test_a_line_that_a_kill_cut_off_is_left_out_and_written_again(tmp_path):
    path = tmp_path / "partial.jsonl"
    killed = PartialResults(path, FULL)
    killed.append(0, [[0, "a"]])
    killed.close()
    with open(path, "ab") as stream:
        stream.write(b'{"batch": 1, "resu')
    resumed = PartialResults(path, FULL)
    assert resumed.batches == {0: [[0, "a"]]}
    resumed.append(1, [[1, "b"]])
    resumed.close()
    assert opened(path, FULL) == {0: [[0, "a"]], 1: [[1, "b"]]}
