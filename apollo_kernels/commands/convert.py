"""``convert``: a file of optimizer state that another optimizer wrote, as one of APOLLO's."""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_kernels import converters, keys, state
from apollo_kernels.commands import groups as choices
from apollo_kernels.commands import models
from apollo_kernels.commands.output import check_target, write_whole
from apollo_kernels.optimizer import APOLLO, parts_of

# Where checkpoints keep an optimizer's state: of many scripts, and of Lightning (a list).
PLACES = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")
# Of what a saved group may hold beside APOLLO's own keys, and which of those are in no group.
OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
OF_THE_OPTIMIZER = ("params", "seed", "backend", "max_grad_norm", "gradient_release")
Names = list[list[str]]  # of the parameters of each group

_DESCRIPTION = """\
Reads optimizer state (a state_dict that torch.save wrote, alone or in a checkpoint under one of the
usual keys) and writes it as APOLLO's, which load_state_dict takes; whatever else the checkpoint
holds stays as it is. Who wrote the state is found out:

  apollo_torch    moments, steps and the limiter's norm are taken over, projections drawn anew, as
                  both packages do every update_proj_gap steps. Groups as they were.
  GaLore          moments are carried into the space of a random projection: M exactly, V in
                  expectation. Groups as they were, with APOLLO's scale.
  AdamW           the same, into the groups of apollo(model) or apollo_mini(model); --lr is needed,
                  since APOLLO's learning rate is another.
  apollo_kernels  keys of projections that went by position are replaced by those that go by name.
                  Groups as they were; moments stay, as after a redraw.

MODEL tells shapes and names. If the file has no names of parameters, the usual groupings are tried,
and the one that fits is taken; where none or several do, --groups says it."""


def add_arguments(parser: Any) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = """examples:
  python -m apollo_kernels convert 7b old/optimizer.pt new/optimizer.pt --allow-unsafe-pickle
  python -m apollo_kernels convert ./model adamw.pt apollo.pt --lr 0.01 --rank 256
  python -m apollo_kernels convert train:make_model run.pt run.pt --force

exit codes: 0 written; 2 wrong input, and nothing is written."""
    parser.add_argument("model", help=models.MODEL_HELP)
    parser.add_argument("source", help="the file to read")
    parser.add_argument("target", help="the file to write")
    choices.add_choices(parser)
    parser.add_argument("--lr", type=float, help="of all groups; needed for AdamW's state")
    parser.add_argument("--seed", type=int, default=0, help="the optimizer's seed; default 0")
    parser.add_argument(
        "--groups",
        metavar="MODULE:FUNCTION",
        help="function(model) returns the parameter groups of the source",
    )
    parser.add_argument("--force", action="store_true", help="replace TARGET if it exists")
    parser.add_argument(
        "--allow-unsafe-pickle",
        action="store_true",
        help="read Python objects, which can run any code: apollo_torch and GaLore "
        "write some; for files that you trust",
    )


# ---- files ---------------------------------------------------------------------------------------


def _read(path: Path, unsafe: bool) -> Any:
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no file of torch.save")
    try:
        if unsafe:
            pickle_module: Any = converters._Pickle
            return torch.load(path, "cpu", weights_only=False, pickle_module=pickle_module)
        return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe:
            raise ValueError(f"{path} is no file of torch.save: {error}") from None
        raise ValueError(
            f"{path} holds Python objects, as states of apollo_torch and GaLore do; if you trust "
            "the file, add --allow-unsafe-pickle (unpickling can run any code)"
        ) from None
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is no file of torch.save: {error}") from None


def _found_in(whole: Any, path: Path) -> tuple[dict[str, Any], Any]:
    """The optimizer's state_dict in a checkpoint, and the place: a key, (key, 0), or None."""
    if isinstance(whole, dict) and "param_groups" in whole:
        return whole, None
    for key in PLACES if isinstance(whole, dict) else ():
        inner = whole.get(key)
        if isinstance(inner, dict) and "param_groups" in inner:
            return inner, key
        if isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], dict):
            return inner[0], (key, 0)
    raise ValueError(f"{path} holds no optimizer's state_dict, neither itself nor under {PLACES}")


def _put_back(whole: Any, place: Any, made: dict[str, Any]) -> Any:
    if place is None:
        return made
    return {**whole, **({place: made} if isinstance(place, str) else {place[0]: [made]})}


# ---- whose state is whose ------------------------------------------------------------------------


def _groupings(model: nn.Module, options: Any) -> Iterator[tuple[str, Names]]:
    """How a model's parameters are usually grouped, with a word for each way."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    called: dict[Tensor, str] = {p: name for name, p in named}
    if options.groups:
        made = models.call(options.groups, list, "a list of parameter groups", model)
        groups = made if made and isinstance(made[0], dict) else [{"params": made}]
        yield options.groups, [[_name_in(called, p) for p in g["params"]] for g in groups]
        return
    yield "model.parameters()", [[name for name, _ in named]]
    made = choices.chosen(model, options)
    chosen = [[called[p] for p in group["params"]] for group in made]
    yield "apollo(model)", chosen
    low = {name for names, group in zip(chosen, made, strict=True) if group.get("rank")
           for name in names}  # fmt: skip
    low_rank = [name for name, _ in named if name in low]
    dense = [name for name, _ in named if name not in low]
    by_kind = [name for names in chosen for name in names if name not in low]
    for rest in (dense, by_kind):
        yield "low-rank and the rest", [low_rank, rest]
        yield "the rest and low-rank", [rest, low_rank]
    matrices = [name for name, p in named if p.dim() >= 2]
    vectors = [name for name, p in named if p.dim() < 2]
    yield "matrices and vectors", [matrices, vectors]


def _name_in(called: Mapping[Tensor, str], p: Any) -> str:
    p = p[1] if isinstance(p, tuple) else p
    if p not in called:
        raise ValueError("--groups returned a parameter that is not a trainable one of the model")
    return called[p]


def _fits(saved: Any, p: Tensor) -> bool:
    """Whether a saved state can be that of ``p``; one that is empty can."""
    m = saved.get("exp_avg") if isinstance(saved, Mapping) else None
    if not isinstance(m, Tensor):
        return True
    if "projector" in saved or "update_norm" in saved:  # moments have a side of the parameter's
        return p.dim() >= 2 and bool(set(m.shape) & set(p.shape))
    return m.shape == p.shape


def source_names(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any], model: nn.Module, options: Any
) -> tuple[str, Names]:
    """What the parameters of the file's groups are called, and how that was found."""
    shapes = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not options.groups and all("param_names" in group for group in groups):
        found = [list(group["param_names"]) for group in groups]
        strange = [name for names in found for name in names if name not in shapes]
        if strange:
            raise ValueError(f"the model has no parameter {strange[0]!r}, which the file names")
        return "names in the file", found
    fitting: list[tuple[str, Names]] = []
    tried = list(_groupings(model, options))
    for label, candidate in tried:
        candidate = [names for names in candidate if names]
        if [len(names) for names in candidate] != [len(g["params"]) for g in groups]:
            continue
        pairs = [(i, n) for g, ns in zip(groups, candidate, strict=True)
                 for i, n in zip(g["params"], ns, strict=True)]  # fmt: skip
        known = any(candidate == other for _, other in fitting)
        if not known and all(_fits(states.get(i), shapes[name]) for i, name in pairs):
            fitting.append((label, candidate))
    if len(fitting) == 1:
        return fitting[0]
    sizes = [len(group["params"]) for group in groups]
    labels = ", ".join(dict.fromkeys(repr(label) for label, _ in fitting or tried))
    problem = f"several groupings fit ({labels})" if fitting else f"none of {labels} fits"
    raise ValueError(
        f"the file has groups of {sizes} parameters without names, and {problem}: give "
        "--groups module:function, which makes them of the model"
    )


# ---- the conversion ------------------------------------------------------------------------------


def _stand_ins(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the model's shapes on the CPU that take no memory."""
    return {
        name: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.is_floating_point())
        for name, p in model.named_parameters()
    }


def _groups_of_file(
    groups: Sequence[Mapping[str, Any]], names: Names, params: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """The file's own groups, with what of them APOLLO knows."""
    known = {*inspect.signature(APOLLO).parameters, *OF_SCHEDULERS} - set(OF_THE_OPTIMIZER)
    return [
        {**{key: value for key, value in group.items() if key in known},
         "params": [(name, params[name]) for name in called]}
        for group, called in zip(groups, names, strict=True)
    ]  # fmt: skip


def _groups_for_adamw(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], names: Names,
    params: Mapping[str, nn.Parameter], asked: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Those of apollo(model), with AdamW's betas, eps and weight decay."""
    if asked.lr is None:
        raise ValueError(
            "AdamW's learning rate is not APOLLO's (about ten times larger in the paper): say --lr"
        )
    home = {name: group for group, called in zip(groups, names, strict=True) for name in called}
    made = []
    for group in choices.chosen(model, asked):
        called = group["param_names"]
        if missing := [name for name in called if name not in home]:
            raise ValueError(f"the file has no state for parameter {missing[0]!r}")
        theirs = {key: home[called[0]][key] for key in ("betas", "eps", "weight_decay")
                  if key in home[called[0]]}  # fmt: skip
        made.append({**group, **theirs, "params": [(name, params[name]) for name in called]})
        made[-1].pop("param_names")
    return made


def converted(
    model: nn.Module, groups: list[dict[str, Any]], states: Mapping[Any, Any], asked: Any
) -> tuple[dict[str, Any], str]:
    """APOLLO's state_dict, and a line about what was done."""
    kind = converters.kind_of(states)
    how, names = source_names(groups, states, model, asked)
    params = _stand_ins(model)
    if kind == "AdamW":
        made = _groups_for_adamw(model, groups, names, params, asked)
    else:
        made = _groups_of_file(groups, names, params)
    if kind == "galore_torch":
        scale = {"scale_type": "channel", "scale": 1.0}
        if asked.mini:
            raise ValueError("--mini is of rank 1, and the groups of this file keep their own rank")
        made = [{**group, **scale, "proj": asked.proj} if group.get("rank") else group
                for group in made]  # fmt: skip
    for group in made if asked.lr is not None else ():
        group["lr"] = asked.lr
        group.pop("initial_lr", None)
    optimizer = APOLLO(made, seed=asked.seed)
    saved = {name: states.get(i) for group, called in zip(groups, names, strict=True)
             for i, name in zip(group["params"], called, strict=True)}  # fmt: skip
    template = optimizer.state_dict()
    state_of: dict[int, dict[str, Any]] = {}
    taken: set[int] = set()
    replaced = 0
    for index, group in enumerate(optimizer.param_groups):
        for place, (p, name) in enumerate(zip(group["params"], group["param_names"], strict=True)):
            theirs = saved[name]
            if not isinstance(theirs, Mapping) or "exp_avg" not in theirs:
                continue  # it has taken no step
            title = optimizer._name_of(index, place)
            own = _one(kind, optimizer, p, group, theirs, title)
            if "seed" in own:
                own["seed"] = keys.new_key(asked.seed, name, 0, 1, taken)
                taken.add(own["seed"])
                replaced += theirs.get("seed") not in (None, own["seed"])
            state_of[template["param_groups"][index]["params"][place]] = own
    optimizer.load_state_dict({"state": state_of, "param_groups": template["param_groups"]})
    low = sum("update_norm" in own for own in state_of.values())
    text = f"{kind}'s state ({how}): {low} low-rank and {len(state_of) - low} dense parameters"
    if kind == "apollo_kernels":
        text += f", {replaced} keys replaced"
    return optimizer.state_dict(), text


def _one(
    kind: str, optimizer: APOLLO, p: Tensor, group: dict[str, Any], saved: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:  # fmt: skip
    if kind == "apollo_kernels":
        return dict(saved)
    if kind == "apollo_torch":
        return converters._convert_parameter(optimizer, p, group, saved, name)
    made = converters.from_another_space(optimizer, p, group, saved, name)
    if not state.needs_key(p, group):
        made.pop("seed", None)
    return made


def command(asked: Any) -> str:
    source, target = Path(asked.source), Path(asked.target)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{str(target)!r} cannot be written: give a file in a folder that exists")
    check_target(target, asked.force)
    whole = _read(source, asked.allow_unsafe_pickle)
    found, place = _found_in(whole, source)
    groups, states = parts_of(found, str(source))
    made, text = converted(models.build(asked.model), groups, states, asked)
    write_whole(target, lambda file: torch.save(_put_back(whole, place, made), file))
    return f"{text} -> {target}"
