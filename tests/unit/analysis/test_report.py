"""A report says what the files say, however few or damaged, and carries nothing that could harm a reader."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from open_mythos.analysis.record import Record
from open_mythos.analysis.report import write_report
from open_mythos.cli import main as cli
from open_mythos.train.metrics import MetricsLog

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balanced(HTMLParser):
    """Checks that every tag is closed in order, and gathers the text and the ids."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], set(), [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(path):
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def a_run(folder, steps=40):
    folder.mkdir()
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            loss = 2 + 4 / step
            row = {
                "step": step,
                "time": 1.5 * step,
                "loss": loss,
                "bits_per_byte": loss / 2,
                "tokens": 512 * step,
            }
            row |= {"grad_norm": 1 / step, "rho": 0.9, "tokens_per_second": 1000.0, "loops": 4.0}
            log.append(row | ({"eval_bits_per_byte": loss / 2 + 0.1} if step % 10 == 0 else {}))
    return folder


def a_whole_run(folder):
    a_run(folder)
    *lines, last = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.dumps(json.loads(last) | {"eval_bits_per_byte": 1.25})  # at the end, of all held-out text
    (folder / "metrics.jsonl").write_text("\n".join([*lines, last]) + "\n")
    loops = list(range(1, 9))
    sweep = {
        "loops": loops, "bits_per_byte": [2.0, 1.5, 1.3, 1.25, 1.24, 1.24, 1.25, 1.252], "trained_loops": 4,
        "relative_step": [1 / n for n in loops], "state_norm": [5.0] * 8, "expert_load": [[1, 2, 3, 4]] * 8,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(sweep))
    (folder / "baselines.json").write_text(json.dumps({"gzip -9": 1.96, "oracle": 1.1}))
    (folder / "config.json").write_text(json.dumps({"is": "Demo", "dim": 64}))
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 5, "text": "<script>alert('x')</script>\x1b[0m & co"})
    )
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_report(a_whole_run(tmp_path_factory.mktemp("whole") / "run"))


def test_a_whole_run_gives_the_whole_page(whole):
    page = parsed(whole)
    assert whole.parts[-2:] == ("run", "report.html")
    for words in (
        "Demo: 40 steps, 20.5k tokens, 1:00 of training.",
        "The model needs 1.250 bits for a byte of text that it never saw.",
        "That is less than gzip -9.",
        "That is no better than oracle.",
        "The best of the depths tried is 5 loops (1.240 bits per byte).",
        "At 8 loops, 2 times the trained depth, the loss is within half a percent of that at the trained 4",
        "With only 1 it is 2.000.",
        '"dim": 64',
        "<script>alert('x')</script>",
    ):
        assert words in page.text
    assert {p.name for p in (whole.parent / "plots").iterdir()} == {
        "loss.png", "loops.png", "motion.png", "expert_load.png", "vital_signs.png",
    }  # fmt: skip


def test_the_page_stands_alone_and_runs_nothing(whole):
    page = parsed(whole)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|//[a-z]", whole.read_text())
    assert "\x1b" not in whole.read_text()
    assert len(page.ids) == len(set(page.ids)) > 20
    assert "currentColor" in whole.read_text()


@pytest.mark.parametrize(
    ("deep", "words"), [(1.40, "is 12.0% higher than at"), (1.2, "is 4.0% lower than at")]
)
def test_a_loss_that_moves_beyond_the_trained_depth_is_said(tmp_path, deep, words):
    (tmp_path / "sweep.json").write_text(
        json.dumps({"loops": [4, 16], "bits_per_byte": [1.25, deep], "trained_loops": 4})
    )
    assert words in parsed(write_report(tmp_path)).text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_young_run_has_a_report(tmp_path, steps):
    run = a_run(tmp_path / "run", steps)
    assert ("Nothing has been logged yet." in parsed(write_report(run)).text) == (steps == 0)


@pytest.mark.parametrize("left", ["config", "metrics", "sweep", "baselines", "samples"])
def test_any_part_alone_is_enough(tmp_path, left):
    run = a_whole_run(tmp_path / "run")
    for file in run.glob("*.json*"):
        if file.stem != left:
            file.unlink()
    parsed(write_report(run))


def test_damage_is_said_and_the_rest_is_shown(tmp_path):
    run = a_whole_run(tmp_path / "run")
    (run / "sweep.json").write_text('{"loops": [1, 2')
    (run / "baselines.json").write_text("[1.96]")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 41, "lo')
    text = parsed(write_report(run)).text
    assert "sweep.json could not be read" in text
    assert "baselines.json could not be read: it should hold a JSON object, not list" in text
    assert "40 steps" in text


@pytest.mark.parametrize(
    "sweep",
    [
        {
            "loops": [1, 2],
            "bits_per_byte": [None, "x"],
            "trained_loops": "four",
            "expert_load": [[1], [1, 2]],
        },
        {"loops": 3, "bits_per_byte": {}, "relative_step": [None], "state_norm": [1.0], "expert_load": [[]]},
        {"loops": [0, 1, 2], "bits_per_byte": [1.0, 2.0], "expert_load": [[0, 0], [0, 0]]},
        {
            "loops": [2],
            "bits_per_byte": [1.5],
            "trained_loops": 2,
            "relative_step": [0.0],
            "state_norm": [0.0],
        },
    ],
)
def test_strange_numbers_do_not_stop_the_report(tmp_path, sweep):
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    parsed(write_report(tmp_path))


def test_losses_lost_to_overflow_are_passed_over(tmp_path):
    run = a_run(tmp_path / "run", 3)
    with MetricsLog(run / "metrics.jsonl", keep=3) as log:
        log.append({"step": 4, "loss": float("nan"), "tokens": 2048})
    record = Record.read(run)
    assert np.isnan(record.series("loss")[-1])
    assert record.last("loss") == pytest.approx(2 + 4 / 3)
    parsed(write_report(run))


def test_samples_in_the_metrics_are_found(tmp_path):
    run = a_run(tmp_path / "run", 3)
    with MetricsLog(run / "metrics.jsonl", keep=3) as log:
        log.append({"step": 4, "sample": "once upon"})
    assert Record.read(run).texts == [(4, "once upon")]


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = parsed(write_report(a_whole_run(tmp_path / "run"))).text
    assert "pip install 'open_mythos[plot]'" in text
    assert "The model needs 1.250 bits" in text


def test_the_command_writes_and_names_the_page(tmp_path, capsys):
    run = a_run(tmp_path / "run", 2)
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [run]
