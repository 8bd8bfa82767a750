"""``plot``: what of a log is drawn, and mistakes in one line. Pictures are looked at by people."""

import json

import pytest

pytest.importorskip("matplotlib")

from apollo_kernels.__main__ import main
from apollo_kernels.commands import plot

CSV = "step,loss,validation,lr,limited\n1,3.0,,0.1,\n2,2.0,2.5,0.05,0.25\n3,nan,2.2,0.01,0.5\n"


def told(p50):
    scales = {"min": 1, "p10": p50 / 2, "p50": p50, "p90": 2 * p50, "max": 9}
    return {"scales": scales, "update_norm": 1.0, "limited": 0.5}


def detailed_row(step):
    names = [f"model.layers.{i}.self_attn.{k}_proj.weight" for i in range(3) for k in "qv"]
    detail = {name: told(step + i) for i, name in enumerate(names)}
    return {"step": step, "scale_p10": 1.0, "scale_p50": 2.0, "scale_p90": 3.0, "detail": detail}


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.csv").write_text(CSV)
    lines = [json.dumps(detailed_row(step)) for step in (1, 2)]
    (tmp_path / "deep.jsonl").write_text("\n".join(lines) + "\n\n")
    history = [{"loss": 2.0, "learning_rate": 0.1, "step": 5}, {"eval_loss": 1.9, "step": 5}]
    # as Trainer ends every run: train_loss is the mean over all of it
    history.append({"step": 5, "train_runtime": 9.5, "train_loss": 3.5, "total_flos": 1e9})
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "epoch": 1}))
    return tmp_path


def test_points_are_the_finite_numbers_of_a_column(logs):
    log = plot.read(logs / "run.csv")
    assert log.points("loss") == ([1, 2], [3.0, 2.0])
    assert log.points("validation") == ([2, 3], [2.5, 2.2])
    assert log.points("limited") == ([2, 3], [0.25, 0.5])
    assert log.points("update_norm") == ([], [])


def test_logs_of_the_trainer_are_read_under_our_names(logs):
    log = plot.read(logs / "trainer_state.json")
    assert log.points("loss") == ([5], [2.0])
    assert log.points("validation") == ([5], [1.9])
    assert log.points("lr") == ([5], [0.1])


def test_parameters_that_differ_by_their_layer_are_one_kind(logs):
    log = plot.read(logs / "deep.jsonl")
    # q: numbers 0, 2, 4 of each row; v: 1, 3, 5
    assert plot.kinds_of(log) == {"q_proj": [(1, 3), (2, 4)], "v_proj": [(1, 4), (2, 5)]}


def test_only_panels_with_numbers_are_drawn(logs, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: drawn.append(figure))

    def titles(*names):
        plot.draw([plot.read(logs / name) for name in names], None, logs / "x.png")
        return [axes.get_title(loc="left").split(":")[0] for axes in drawn[-1].axes
                if axes.get_visible()]  # fmt: skip

    assert titles("run.csv") == ["loss", "share of matrices held by the limiter", "learning rate"]
    assert titles("deep.jsonl") == ["scale factors"]
    assert len(titles("run.csv", "deep.jsonl")) == 4


def test_smoothing_is_a_mean_of_the_last_fiftieth():
    assert plot.smoothed([1.0, 3.0, 5.0]) == [1.0, 3.0, 5.0]
    assert plot.smoothed([float(i % 2) for i in range(100)])[1:] == [0.5] * 99


def test_a_picture_is_written_and_never_replaced_without_force(logs, capsys):
    assert main(["plot", "run.csv", "deep.jsonl", "--title", "Two runs"]) == 0
    assert capsys.readouterr().out == "run.png\n"
    assert (logs / "run.png").read_bytes().startswith(b"\x89PNG")
    (logs / "run.png").write_bytes(b"mine")
    assert main(["plot", "run.csv"]) == 2
    assert (logs / "run.png").read_bytes() == b"mine"
    assert main(["plot", "run.csv", "--force"]) == 0
    assert (logs / "run.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "run.csv", "--png", "other.png"]) == 0
    assert (logs / "other.png").exists()


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--png", "x.png", "--force", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["--png", "nowhere/x.png"], "nowhere/x.png: No such file or directory"),
        (["--png", ".", "--force"], ".: Is a directory"),
        (["--png", "deep.jsonl", "--force"], "--png 'deep.jsonl' is a log that is drawn"),
        (["--png", "x.png", "--force", "."], ".: Is a directory"),
    ],
)
def test_a_picture_that_cannot_be_is_one_line(logs, arguments, piece, capsys):
    before = {path: path.read_bytes() for path in logs.iterdir()}
    assert main(["plot", *arguments[3:], "run.csv", "deep.jsonl", *arguments[:3]]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and piece in error
    assert {path: path.read_bytes() for path in logs.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        ("", "it has no rows with a number under 'step'"),
        ("a,b\n1,2\n", "it has no rows with a number under 'step'"),
        ("step,note\n1,x\n", "no column to draw among"),
        ("step,loss\n1,x\n", "no column to draw among"),
        ("step,loss\n1,nan\n", "no column to draw among"),
        ('{"step": 1, "detail": {"w": {"scales": {"p50": null}}}}', "no column to draw among"),
        ('{"step": 1}\n{"step":\n', "line 2 is no JSON"),
        ('{"log_history": [3]}', "rows that are no JSON objects"),
        ('{"log_history": null}', "log_history must be a list, got null"),
        ('{"step": 1, "detail": [2]}', "step 1: detail must be an object by parameter, got [2]"),
        ('{"step": 1, "detail": {"w": {"limited": 0}}}', "detail of 'w' has no scales with p50"),
        ('{"step": 1, "detail": {"w": {"scales": 3}}}', "detail of 'w' has no scales with p50"),
        ("step,detail\n1,x\n", 'detail must be an object by parameter, got "x"'),
        (b"\xff\xfe\x00", "log: "),
        (None, "No such file"),
    ],
)
def test_what_is_no_log_is_one_line(content, piece, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "log").write_bytes(data)
    assert main(["plot", "log"]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and piece in error
