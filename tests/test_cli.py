"""``python -m apollo_kernels``: what commands say, and what they answer to mistakes."""

import importlib
import io
import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from apollo_kernels import __main__, info, native
from apollo_kernels.__main__ import COMMANDS, main
from apollo_kernels.commands import check, contest, output


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ---- all commands --------------------------------------------------------------------------------


def test_version_and_the_list_of_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == "apollo_kernels 0.1.0\n"
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command.name} " in text
    assert "exit codes: 0" in text and "examples:" in text


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_help_reads_like_a_manual(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 6 and max(map(len, text.splitlines())) <= 100
    codes = "those of PROGRAM" if name == "run" else "0"
    assert "\x1b" not in text and f"exit codes: {codes}" in text
    assert name == "info" or f"python -m apollo_kernels {name}" in text.split("examples:")[1]


@pytest.mark.parametrize(
    "arguments", [[], ["unknown"], ["info", "more"], ["estimate", "7b", "--batch", "x"]]
)
def test_bad_usage_is_one_line_and_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert not out and error.count("\n") == 1 and "usage" in error


def test_the_package_imports_no_command_and_a_command_only_its_own_module():
    code = "import sys, apollo_kernels\n"
    code += "def loaded(): print(*(m for m in sys.modules if m.startswith('apollo_kernels')))\n"
    code += "loaded(); from apollo_kernels.__main__ import main; main(['info']); loaded()"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, *_, after = (set(line.split()) for line in out.stdout.splitlines())
    commands = {command.module for command in COMMANDS} | {"apollo_kernels.commands"}
    assert commands & before == set()
    assert commands & after == {"apollo_kernels.info"}


def test_a_warning_is_a_line_without_our_source(monkeypatch):
    monkeypatch.setattr(__main__, "main", lambda: 0)
    monkeypatch.setattr(warnings, "formatwarning", None)  # as it is now, afterwards
    assert __main__.run() == 0
    text = warnings.formatwarning(UserWarning("two\nlines"), UserWarning, "groups.py", 3)
    assert text == "warning: two lines\n"


def test_an_interrupt_is_one_line_and_exit_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "main", interrupted)
    assert __main__.run() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_stops_reading_causes_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "apollo_kernels", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd="/")
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


# ---- output --------------------------------------------------------------------------------------


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.paint("ok", "green", Terminal()) == "\x1b[32mok\x1b[0m"
    assert output.paint("ok", "green", io.StringIO()) == "ok"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("ok", "green", Terminal()) == "ok"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert output.paint("ok", "green", Terminal()) == "ok"


def test_the_bar_is_for_terminals_and_leaves_no_line():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with output.Progress("steps", 4, stream) as bar:
            bar.update(4)
    assert "steps [##############################] 4/4" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert file.getvalue() == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        output.write_whole(path, broken)
    assert path.read_bytes() == b"old"
    os.link(path, tmp_path / "former")  # another name of the old file, which nobody writes into
    output.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and (tmp_path / "former").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "former"]
    with pytest.raises(ValueError, match="nowhere/file: No such file"):
        output.write_whole(tmp_path / "nowhere/file", lambda file: None)


# ---- info ----------------------------------------------------------------------------------------


def test_info_names_the_back_end_and_why_others_do_not_run(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for piece in ("apollo_kernels  0.1.0", "torch", "native module", "cpu: back end torch"):
        assert piece in text
    assert "not cuda: needs a CUDA device" in text and "not triton:" in text


def test_info_json_is_machine_readable(capsys):
    assert main(["info", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["devices"]["cpu"]["runs"] == "torch"
    assert out["native_module"]["present"] is True


def test_info_tells_why_the_native_module_is_missing(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    collected = info.collect()
    assert collected["native_module"]["present"] is False
    assert "not built" in info.as_text(collected)


@pytest.mark.parametrize(
    ("kernels", "line"),
    [
        (
            {"cuda": True, "cuda_toolkit": "13.0", "cuda_architectures": "80-real 120"},
            "CUDA kernels    CUDA 13.0, for 80-real 120 (torch was a build for CUDA)",
        ),
        (
            {"cuda": False, "cuda_missing": "no nvcc at build time"},
            "CUDA kernels    no: no nvcc at build time (torch was a build for CUDA)",
        ),
        (
            {"cuda": False, "cuda_missing": "torch was a build for CUDA"},
            "CUDA kernels    no: torch was a build for CUDA",
        ),
    ],
)
def test_info_tells_why_cuda_kernels_were_asked_for(kernels, line, tmp_path, monkeypatch):
    known = {"compiler": "GNU", "build_type": "Release", "cuda_toolkit": "", "cuda_missing": None}
    build = types.SimpleNamespace(build_info=lambda: {**known, "cuda_architectures": "", **kernels})
    collected = info.collect()
    monkeypatch.setattr(native, "_C", build)
    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    (tmp_path / "_cuda_why.txt").write_text("torch was a build for CUDA\n")
    collected["native_module"] = info._native()
    assert line in info.as_text(collected).splitlines()


def test_info_survives_a_wrong_environment(monkeypatch):
    monkeypatch.setenv("APOLLO_KERNELS_BACKEND", "cuda")
    text = info.as_text(info.collect())
    assert "cpu: back end NONE" in text and "APOLLO_KERNELS_BACKEND='cuda' cannot run" in text


# ---- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", check.CASES, ids=str)
def test_every_back_end_passes_the_check(backend, case):
    if backend.interpreted and max(case.shape) > 100:
        pytest.skip("takes seconds in Triton's interpreter")
    text = check.follows_the_formula(case, backend.name, backend.device)
    share = float(text.split("error ")[1].split()[0])
    assert share < 0.6  # of what is allowed: half an ulp of a bf16 weight


def test_every_back_end_goes_through_a_file(backend):
    assert "the same bits" in check.goes_through_a_file(backend.name, backend.device)


WRONG = {
    "scales": ("_ratio", lambda original: lambda m, d, eps: 1.01 * original(m, d, eps)),
    "limiter": ("limit", lambda original: lambda u, previous: (1.0, u)),
    "weights": ("apply", lambda original: lambda w, x, c, d: original(w, x, 1.01 * c, d)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_step_that_is_one_percent_wrong_fails_the_check(what, monkeypatch, capsys):
    """The share of 1 % is seen in float32; the limiter in any dtype."""
    from apollo_kernels import cpu, reference

    monkeypatch.setattr(cpu, "supported", lambda *_: False)  # the plain passes
    name, wrong = WRONG[what]
    monkeypatch.setattr(reference, name, wrong(getattr(reference, name)))
    assert main(["check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  cpu torch     APOLLO, rank 8, float32" in out
    assert "ok    cpu torch     state" in out


def test_a_check_that_raises_is_a_line_too(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("driver\nsays no")

    monkeypatch.setattr(check, "goes_through_a_file", broken)
    assert main(["check", "--device", "cpu", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(check.CASES) + 1
    assert [row["detail"] for row in rows if not row["ok"]] == ["driver says no"]


def test_check_tells_of_the_devices_that_there_are(capsys):
    assert main(["check", "--device", "tpu"]) == 2
    assert capsys.readouterr().err.startswith("check: --device 'tpu': this machine has cpu")


# ---- groups --------------------------------------------------------------------------------------


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.lm_head = torch.nn.Linear(16, 50)


@pytest.fixture
def tower(monkeypatch, tmp_path):
    """A module to name on the command line."""
    (tmp_path / "mine.py").write_text(
        "from test_cli import Tower\n"
        "def broken(): raise RuntimeError('no data')\n"
        "def number(): return 3\n"
        "def stops(): raise SystemExit('no data')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "mine:Tower"
    sys.modules.pop("mine", None)


def test_groups_says_where_each_parameter_goes_and_why(tower, capsys):
    assert main(["groups", tower, "--rank", "4", "--json"]) == 0
    rows = {row["parameter"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 9
    assert (
        rows["layers.1.weight"]["step"] == "rank 4" and rows["layers.1.weight"]["why"] == "Linear"
    )
    assert rows["embed.weight"]["step"] == "AdamW" and rows["embed.weight"]["why"] == "embedding"
    assert rows["lm_head.weight"]["why"] == "output head"
    state = 8 + 2 * 4 * 16 * 4 + 4
    assert rows["layers.1.weight"]["state MB"] == pytest.approx(state / 1e6)


def test_groups_folds_layers_and_adds_up(tower, capsys):
    assert main(["groups", tower, "--mini"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("layers.{0-2}.weight")]
    assert line.split()[1:4] == ["3", "16x16", "rank"]
    assert any(line.startswith("total") for line in lines)
    assert main(["groups", tower, "--mini", "--all", "--embeddings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("layers.") and ".weight" in line for line in lines) == 3
    assert any(line.startswith("embed.weight") and "rank 1" in line for line in lines)


def test_groups_of_a_preset_and_of_a_config(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["groups", "60m"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.{0-7}.self_attn.q_proj.weight" in out and "rank 128" in out
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 90}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["groups", str(tmp_path)]) == 0
    assert "transformer.h.{0-1}.attn.c_attn.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["nothing"], "model 'nothing' is none of"),
        (["mine:nothing"], "cannot be imported"),
        (["nowhere:Tower"], "cannot be imported: No module named 'nowhere'"),
        (["mine:number"], "must return a torch.nn.Module, got int"),
        (["mine:broken"], "mine:broken raised RuntimeError: no data"),
        (["mine:stops"], "mine:stops raised SystemExit: no data"),
        (["folder"], "model 'folder' is none of"),
        (["bytes.json"], "bytes.json is no JSON file: 'utf-8' codec"),
        (["huge.json"], "huge.json: transformers cannot build it: empty(): argument 'size'"),
        (["mine:Tower", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["mine:Tower", "--mini", "--rank", "4"], "--mini has rank 1"),
        (["mine:Tower", "--targets", "("], "no regular expression"),
        (["mine:Tower", "--rank", "4", "--targets", "nothing"], "matches no parameter"),
        (["broken.json"], "is no JSON file"),
        (["empty.json"], "has no model_type"),
        (["strange.json"], "transformers cannot build it"),
    ],
)
def test_groups_tells_mistakes_in_one_line(arguments, piece, tower, tmp_path, capsys):
    if arguments in (["strange.json"], ["huge.json"]):
        pytest.importorskip("transformers")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "strange.json").write_text('{"model_type": "no-such-model"}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "huge.json").write_text(f'{{"model_type": "llama", "hidden_size": {10**30}}}')
    (tmp_path / "folder").mkdir()
    assert main(["groups", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and piece in error
    assert "Exception raised from" not in error


# ---- bench ---------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A config.json of one small layer."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "vocab_size": 50, "model_type": "llama"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_bench_has_a_table_a_csv_and_a_picture(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = ["--csv", str(tmp_path / "step.csv"), "--png", str(tmp_path / "step.png")]
    assert main(["bench", str(small), "--rounds", "2", *files]) == 0
    out = capsys.readouterr().out
    assert "2 layers, float32" in out
    for name in ("ours torch, rank 8 ", "ours torch, Mini", "AdamW fused", "apollo_torch, Mini"):
        assert name in out
    assert "Adafactor" not in out
    header, *lines = (tmp_path / "step.csv").read_text().splitlines()
    assert header.startswith("model,dtype,optimizer") and len(lines) >= 5
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", str(small), "--rounds", "2", *files[2:]]) == 2
    assert "step.png' exists: add --force to replace it" in capsys.readouterr().err
    assert main(["bench", str(small), "--rounds", "1", *files[2:], "--force"]) == 0


def test_bench_json_has_the_rows_and_what_they_depend_on(small, capsys):
    arguments = ["--rounds", "1", "--layers", "1", "--dtype", "bfloat16", "--rank", "4", "--all"]
    assert main(["bench", str(small), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["optimizer"]: row for row in found["rows"]}
    assert found["environment"]["torch"] == torch.__version__
    assert rows["ours torch, rank 4"]["ms"] > 0 and rows["AdamW fused"]["x AdamW"] == 1
    assert "Adafactor" in rows
    # Mini: two moments and a norm for each of 7 matrices, a step; channels 4 x 32 and 3 x 64
    assert rows["ours torch, Mini"]["state MB"] == pytest.approx((8 * 320 + 12 * 7) / 1e6)


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--csv", "nowhere/rows.csv"], "nowhere/rows.csv: No such file or directory"),
        (["--csv", "."], ".: Is a directory"),
        (["--csv", ""], ".: Is a directory"),
        (["--csv", "rows.csv", "--png", "nowhere/bars.png"], "nowhere/bars.png: No such file"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--layers", "9"], "--layers 9: 60m has 8"),
        (["--rank", "-1"], "--rank must be at least 1"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--device", "meta"], "--device 'meta': a step is timed on a CPU or on a CUDA device"),
        (["no-model"], "'no-model' is neither a file"),
    ],
)
def test_bench_tells_mistakes_in_one_line(arguments, piece, tmp_path, monkeypatch, capsys):
    """Before it has timed anything, and with nothing written."""
    if "--png" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contest, "race", None)
    assert main(["bench", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and piece in error
    assert os.listdir() == []


def raises(error):
    def sysconf(name):
        raise error

    return sysconf


@pytest.mark.parametrize(
    "sysconf",
    [None, raises(ValueError("unrecognized configuration name")), raises(OSError())],
    ids=["Windows", "macOS", "a system that will not tell"],
)
def test_bench_takes_all_layers_where_free_memory_is_not_told(sysconf, monkeypatch):
    model = contest.Model("large", [(10**6, 10**6)], layers=7, hidden=10**6)
    cpu = torch.device("cpu")
    assert contest.fitting_layers(model, 4, cpu, together=5) == 1
    if sysconf is None:
        monkeypatch.delattr(os, "sysconf")
    else:
        monkeypatch.setattr(os, "sysconf", sysconf)
    assert contest.fitting_layers(model, 4, cpu, together=5) == 7


def test_every_module_of_the_table_has_its_two_functions():
    for command in COMMANDS:
        module = importlib.import_module(command.module)
        assert callable(module.add_arguments) and callable(module.command)
