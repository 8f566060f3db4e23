"""metrics.jsonl holds what was measured, survives a kill, and forgets steps that a resumed run repeats."""

import json
import math

import numpy as np
import pytest
import torch

from open_mythos.train.metrics import MetricsLog, read_rows


def written(path, steps, keep=0):
    with MetricsLog(path, keep) as log:
        for step in steps:
            log.append({"step": step, "loss": 3.0 - step / 10})


def steps_of(path):
    return [row["step"] for row in read_rows(path)]


def test_lines_are_there_before_the_file_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append({"step": 1, "loss": torch.tensor(2.5), "rho": np.float32(0.5), "load": [1, 2]})
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "rho": 0.5, "load": [1, 2]}
    ]
    log.close()


def test_resume_drops_what_came_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 8))
    written(path, range(5, 7), keep=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    written(path, [1])
    assert steps_of(path) == [1]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "{"])
def test_a_line_cut_short_is_not_read_and_is_dropped_on_resume(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3])
    with path.open("a") as file:
        file.write(torn)
    assert steps_of(path) == [1, 2, 3]
    written(path, [4], keep=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_whole_last_line_counts_without_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert steps_of(path) == [1, 2]


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": math.nan, "grad_norm": torch.tensor(math.inf), "load": [math.nan]})
    assert read_rows(path) == [{"step": 1, "loss": None, "grad_norm": None, "load": [None]}]


def test_damage_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is not JSON"):
        read_rows(path)
    path.write_text("[1]\n{}\n")
    with pytest.raises(ValueError, match=r"line 1 .* should be a JSON object"):
        read_rows(path)
    with MetricsLog(tmp_path / "b.jsonl") as log, pytest.raises(ValueError, match="needs its step, got loss"):
        log.append({"loss": 1.0})
