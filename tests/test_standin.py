"""apollo_kernels in the place of apollo_torch: in this process, and in what a program starts."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch

import apollo_kernels
from apollo_kernels import run, standin
from apollo_kernels.__main__ import main


@pytest.fixture
def undo():
    assert "apollo_torch" not in sys.modules
    undo = apollo_kernels.install_as_apollo_torch()
    yield undo
    undo()


def test_apollo_torch_is_found_by_every_way_that_programs_ask(undo):
    import apollo_torch
    from apollo_torch import APOLLOAdamW

    assert issubclass(APOLLOAdamW, apollo_kernels.APOLLOAdamW)
    assert apollo_torch.__version__ == "1.0.3"
    assert importlib.util.find_spec("apollo_torch").origin == apollo_torch.__file__
    assert importlib.metadata.version("apollo_torch") == "1.0.3+apollo.kernels"
    with pytest.raises(ImportError, match="apollo_kernels"):
        from apollo_torch import QAPOLLOAdamW  # noqa: F401


def test_it_takes_groups_as_the_published_class_does(undo):
    from apollo_torch import APOLLOAdamW

    matrix = torch.nn.Parameter(torch.ones(6, 8))
    keys = {"rank": 4, "proj": "random", "scale_type": "channel", "scale": 1.0,
            "update_proj_gap": 200, "proj_type": "std", "scale_front": True}  # fmt: skip
    optimizer = APOLLOAdamW([{"params": [matrix], **keys}], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert not torch.equal(matrix, torch.ones(6, 8))
    assert optimizer.param_groups[0]["scale_front"] is True


def test_optimizers_of_one_parameter_each_do_not_share_projections(undo):
    """As layer-wise training makes them, without names."""
    from apollo_torch import APOLLOAdamW

    keys = []
    for options in ({}, {}, {"seed": 10**6}, {"seed": 10**6}):
        p = torch.nn.Parameter(torch.ones(6, 8))
        optimizer = APOLLOAdamW([{"params": [p], "rank": 4}], **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        keys.append(optimizer.state[p]["seed"])
    assert len(set(keys)) == 3 and keys[2] == keys[3]


def test_an_optimizer_of_one_dense_parameter_is_taken_at_its_word(undo, recwarn):
    """As LLaMA-Factory makes one for each norm and bias; "no group has a rank" is for others."""
    from apollo_torch import APOLLOAdamW

    p, q = (torch.nn.Parameter(torch.ones(6)) for _ in "pq")
    for params in ([{"params": [p], "weight_decay": 0.0}], [{"params": q}]):
        assert APOLLOAdamW(params, lr=0.1).param_groups[0]["rank"] is None
    assert not recwarn.list
    matrix = torch.nn.Parameter(torch.ones(6, 8))
    assert APOLLOAdamW([{"params": [matrix]}], rank=4).param_groups[0]["rank"] == 4
    for params in ([{"params": [p, q]}], [{"params": [("norm", p)]}], [p]):
        with pytest.warns(UserWarning, match="no group has a rank"):
            APOLLOAdamW(params)


def test_installing_twice_is_installing_once_and_undo_leaves_nothing(undo):
    assert apollo_kernels.install_as_apollo_torch() is undo
    assert sys.path.count(str(standin.FOLDER)) == 1
    watches = [f for f in sys.meta_path if type(f).__module__ == "apollo_torch"]
    assert len(watches) == 1
    undo()
    undo()
    assert str(standin.FOLDER) not in sys.path and watches[0] not in sys.meta_path
    assert "apollo_torch" not in sys.modules
    assert importlib.util.find_spec("apollo_torch") is None


def test_a_published_package_that_is_in_use_is_not_replaced(monkeypatch):
    theirs = types.ModuleType("apollo_torch")
    theirs.__file__ = "/somewhere/apollo_torch/__init__.py"
    monkeypatch.setitem(sys.modules, "apollo_torch", theirs)
    with pytest.raises(RuntimeError, match="already, from /somewhere.*before"):
        apollo_kernels.install_as_apollo_torch()
    assert sys.modules["apollo_torch"] is theirs and str(standin.FOLDER) not in sys.path


# ---- python -m apollo_kernels run ----------------------------------------------------------------

TRANSFORMERS = {
    "__init__.py": "from .trainer import Trainer\n",
    "trainer_callback.py": "class TrainerCallback: pass\n",
    "trainer_utils.py": "def check_target_module_exists(targets, name): pass\n",
    "trainer.py": """
class Trainer:
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return "theirs"
""",
}
CHILD = """
import sys
assert not {"torch", "apollo_kernels", "transformers"} & set(sys.modules), "slow to start"
import transformers, types
Trainer = transformers.Trainer
assert Trainer.get_optimizer_cls_and_kwargs(types.SimpleNamespace(optim="adamw_torch")) == "theirs"
try:
    Trainer.get_optimizer_cls_and_kwargs(types.SimpleNamespace(optim="apollo_adamw"))
except ValueError as error:
    print(error)
from apollo_torch import APOLLOAdamW
print(APOLLOAdamW.__module__, sys.hidden, sys.argv[1:])
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "child.py", "--", "-x"], check=True)
"""


def test_a_child_of_a_program_that_is_run_finds_us(tmp_path):
    """Its start is as fast as before, it leaves other optimizers to Trainer, and a sitecustomize of
    somebody else's runs too. (A stand-in of transformers: the real one takes seconds.)"""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "theirs").mkdir()
    for name, text in TRANSFORMERS.items():
        (tmp_path / "transformers" / name).write_text(text)
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "theirs" / "sitecustomize.py").write_text("import sys\nsys.hidden = True\n")
    command = [sys.executable, "-m", "apollo_kernels", "run", "parent.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "theirs"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "optim='apollo_adamw' needs the model, got None",
        "apollo_kernels.standin True ['--', '-x']",
    ]


def test_what_is_run_is_a_script_a_module_or_a_command(tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    name = os.path.basename(sys.executable)
    assert run.command_line([str(script), "-m"]) == [sys.executable, str(script), "-m"]
    assert run.command_line(["a.b", "x"], True) == [sys.executable, "-m", "a.b", "x"]
    assert run.command_line([name, "x"])[1:] == ["x"]
    assert run.command_line([sys.executable]) == [sys.executable]


def test_pythonpath_keeps_what_it_had():
    one = run.environment({"PYTHONPATH": "a" + os.pathsep + "b", "X": "y"})
    assert one == {"PYTHONPATH": os.pathsep.join([str(standin.FOLDER), "a", "b"]), "X": "y"}
    assert run.environment(one) == one
    assert run.environment({})["PYTHONPATH"] == str(standin.FOLDER)


@pytest.mark.parametrize("arguments", [[], ["missing.py"], ["no-such-command"]])
def test_what_cannot_be_run_is_told_in_a_line(arguments, capsys):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(a in error for a in arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such files")
def test_a_command_that_is_no_program_is_told_in_a_line(tmp_path, capsys):
    script = tmp_path / "noexec"
    script.write_text("echo x\n")
    script.chmod(0o755)
    assert main(["run", str(script)]) == 2
    error = capsys.readouterr().err
    assert error == f"run: {str(script)!r} cannot be started: Exec format error\n"
