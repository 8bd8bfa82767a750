"""What the ranks of a group run in tests of sharded parameters, and one process beside them."""

import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

import os  # isort: skip

import torch  # isort: skip
from torch import distributed
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_kernels import APOLLO

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def numbers(shape, seed, dtype=torch.float64):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def mesh_of(shape):
    from torch.distributed.device_mesh import init_device_mesh

    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)


def placed(whole, mesh, placements):
    """The DTensor of ``whole``, which every rank has; placements as text: "0", "1" or "r"."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kinds = [Replicate() if p == "r" else Shard(int(p)) for p in placements]
    return distribute_tensor(whole, mesh, kinds, src_data_rank=None)


def full(t):
    """A copy of the whole; on one rank a DTensor's is its own memory."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t.detach()).clone()


class Case:
    """A run: groups of parameters by shape, and gradients by step. The same numbers everywhere.

    groups: (options, shapes, placements) each; placements are those of ``placed``.
    """

    def __init__(self, groups, dtype="float32", mesh=None, **options):
        self.dtype, self.groups, self.options = DTYPES[dtype], groups, options
        self.mesh = None if mesh is None else mesh_of(mesh)
        self.places, self.params, made = [], [], []
        for own, shapes, placements in groups:
            params = []
            for shape in shapes:
                whole = numbers(shape, len(self.params), self.dtype)
                self.params.append(torch.nn.Parameter(self.laid(whole, placements)))
                self.places.append(placements)
                params.append((f"p{len(self.params) - 1}", self.params[-1]))
            made.append({**own, "params": params})
        self.optimizer = APOLLO(made, **options)

    def laid(self, whole, placements):
        return whole if self.mesh is None else placed(whole, self.mesh, placements)

    def step(self, step, factor=1.0):
        for i, p in enumerate(self.params):
            whole = factor * numbers(p.shape, 1000 * step + i, self.dtype)
            p.grad = self.laid(whole, self.places[i])
        self.optimizer.step()

    def train(self, steps, factor=1.0):
        for step in steps:
            self.step(step, factor)
        return self

    def result(self):
        """Weights and state as one process would have them, and what the reports say."""
        own = self.optimizer
        found = {"stats": own.stats(), "norm": own.grad_norm}
        for i, p in enumerate(self.params):
            found[i, "weight"] = full(p.detach())
            for key, value in own.state[p].items():
                found[i, key] = full(value) if isinstance(value, torch.Tensor) else value
        return found


def run(groups, dtype, mesh, steps, factor, options):
    """Of a whole case; also on one process without a mesh."""
    with torch.no_grad():
        return Case(groups, dtype, mesh, **options).train(steps, factor).result()


def on(place, function, *arguments):
    """``function`` on a back end of conftest.py's."""
    import conftest

    with conftest.running(place):
        return function(*arguments)


def with_takers(groups, dtype, mesh, steps, options):
    """``run``; and which back ends stepped low-rank shards, whole matrices, and dense shards."""
    with torch.no_grad():
        case = Case(groups, dtype, mesh, **options).train(steps)
        works = [work for unit in case.optimizer._runtime.units for work in unit.plan.works]
        took = {(work.low_rank, work.crosses, taker(work.batch)) for work in works}
        return case.result(), took


def taker(batch):
    """The back end that made a batch; reference.py's own choice on a CPU is no other one."""
    name = type(batch).__module__.split(".")[1]
    return "reference" if name == "cpu_batch" else name


def in_buckets(size, *arguments):
    """``run`` with buckets of another size for what goes to other ranks; what it sends, too."""
    import pytest

    from apollo_kernels import distributed as own
    from apollo_kernels import work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "BUCKET", size)
        patch.setattr(work, "BUCKET", size)
        with Counted() as counted:
            return run(*arguments), counted.calls


def recorded(groups, mesh, dtype="float64"):
    """What ``stats(detail=True)`` tells on this rank after gradients that grow and shrink."""
    with torch.no_grad():
        case = Case(groups, dtype, mesh)
        case.optimizer.record_detail = True
        for step, factor in enumerate((1.0, 30.0, 0.1, 0.1, 9.0)):
            case.step(step, factor)
        return case.optimizer.stats(detail=True)["detail"]


def compiled(groups, mesh):
    """A step inside of torch.compile, which it breaks out of: what two of them come to."""
    with torch.no_grad():
        case = Case(groups, "float64", mesh)
        eager, step = case.optimizer.step, torch.compile(case.optimizer.step, backend="eager")
        case.optimizer.step = step
        case.train(range(2))
        case.optimizer.step = eager
        return case.result()


def refused(placements, group, shape=(6, 4), at_construction=True):
    """The message of the error with which a parameter is refused, and the number of groups then."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    known = {"p": Partial(), "s": _StridedShard(0, split_factor=2), "r": Replicate()}
    kinds = [known.get(at) or Shard(int(at)) for at in placements]
    mesh = mesh_of((2,) if len(kinds) == 1 else (2, 1))
    whole = numbers(shape, 0, torch.float32)
    local = whole if kinds[0].is_partial() else whole[:3] if "s" in placements else None
    if local is None:
        p = placed(whole, mesh, placements)
    else:
        p = DTensor.from_local(
            local, mesh, kinds, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    optimizer = APOLLO([("plain", torch.nn.Parameter(numbers((2, 2), 1)))])
    try:
        optimizer.add_param_group({"params": [("odd.weight", torch.nn.Parameter(p))], **group})
    except NotImplementedError as error:
        return str(error), len(optimizer.param_groups)
    return None


def one_rank_refuses(kind):
    """A good step, then one that rank 1 refuses alone, or that ranks want differently; then a good
    one again. What each rank raised, whether anything had changed, and the end."""
    rank = distributed.get_rank()
    low = {"rank": 4, "betas": (0.5, 0.9)}
    case = Case([(low, [(6, 4), (4, 6)], "0"), ({"rank": None}, [(5,)], "0")], "float64", (2,))
    with torch.no_grad():
        case.step(0)
        before = case.result()
        if kind == "state" and rank == 1:
            own = case.optimizer.state[case.params[1]]
            kept, own["step"] = own["step"], torch.tensor(-1)
        if kind == "gradient" and rank == 1:
            case.params[2].requires_grad_(False)
        if kind == "option" and rank == 1:
            case.optimizer.param_groups[0]["lr"] = 0.5
        if kind == "backend" and rank == 1:
            os.environ.update(TRITON_INTERPRET="1", APOLLO_KERNELS_BACKEND="triton")
        try:
            for i, p in enumerate(case.params):
                p.grad = case.laid(numbers(p.shape, 7 + i), "0")
            if kind == "gradient" and rank == 1:
                case.params[2].grad = None
            case.optimizer.step()
            raised = None
        except Exception as error:
            raised = str(error)
        if kind == "state" and rank == 1:
            own["step"] = kept
        case.optimizer.param_groups[0]["lr"] = 1e-3
        os.environ.pop("APOLLO_KERNELS_BACKEND", None)
        same = all(
            torch.equal(value, before[key])
            for key, value in case.result().items()
            if isinstance(value, torch.Tensor)
        )
        case.step(1)
        return raised, same, case.result()


def inf_on_one_rank():
    """What a GradScaler's look at local gradients does where rank 1 alone has found an Inf."""
    case = Case(
        [({"rank": 4}, [(6, 4), (4, 6)], "0"), ({"rank": None}, [(5,)], "0")], "float64", (2,)
    )
    with torch.no_grad():
        case.step(0)
        before = case.result()
        case.optimizer.grad_scale = torch.ones(())
        case.optimizer.found_inf = torch.tensor(float(distributed.get_rank()))
        case.step(1)
        del case.optimizer.grad_scale, case.optimizer.found_inf
        skipped = case.result()
        case.step(2)
    return before, skipped, case.result()


def scaled(mesh, steps, infinite, fused):
    """fully_shard under a GradScaler, with an infinite loss on rank 1 at one step: contents
    after each step, and the scale."""
    net = sharded_model(mesh).float()
    optimizer = optimizer_of(net, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, step, rank, world)
        if step == infinite and rank == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(contents(net, optimizer))
    return seen, scaler.get_scale()


def gradients_elsewhere(steps):
    """Gradients as DTensor's autograd leaves some: a sum in two parts for a replicated parameter,
    and a whole one for a shard. The result, and how the gradients lie after the step."""
    from torch.distributed.tensor import DTensor, Partial

    case = Case([({"rank": 2}, [(6, 4)], "r"), ({"rank": None}, [(5,)], "r"),
                 ({"rank": 2}, [(4, 6)], "0")], "float64", (2,))  # fmt: skip
    with torch.no_grad():
        for step in steps:
            for i, p in enumerate(case.params):
                whole = numbers(p.shape, 1000 * step + i)
                if i == 2:
                    p.grad = case.laid(whole, "r")
                else:
                    share = whole * (0.25 if distributed.get_rank() else 0.75)
                    p.grad = DTensor.from_local(share, case.mesh, [Partial()], run_check=False)
            case.optimizer.step()
        alike = all(p.grad.placements == p.placements for p in case.params)
        return case.result(), alike


def nonfinite(placements, scale_type):
    """A NaN in rank 1's part of the second gradient: weights before and after, and the counters."""
    low = {"rank": 4, "scale_type": scale_type}
    case = Case([(low, [(6, 4), (4, 6)], placements)], "float32", (2,))
    with torch.no_grad():
        case.step(0)
        before = case.result()
        for i, p in enumerate(case.params):
            whole = numbers(p.shape, 7 + i, torch.float32)
            whole[-1, -1] = torch.nan
            p.grad = case.laid(whole, placements)
        case.optimizer.step()
    return before, case.result()


def identity(shapes, mesh, placements, proj):
    """M of a step whose gradient is the identity, with b1 = 0: the projection itself."""
    low = {"rank": 8, "betas": (0.0, 0.9), "proj": proj}
    case = Case([(low, shapes, placements)], "float32", mesh)
    with torch.no_grad():
        for p in case.params:
            p.grad = case.laid(torch.eye(len(p), dtype=torch.float32, device="cpu"), placements)
        case.optimizer.step()
        return [full(case.optimizer.state[p]["exp_avg"]) for p in case.params]


# ---- models under fully_shard --------------------------------------------------------------------


def model():
    """Odd sizes: matrices of both orientations, a vector that some ranks hold nothing of."""
    torch.manual_seed(1)
    of = torch.nn
    body = [of.Embedding(11, 10), of.Linear(10, 17), of.GELU(), of.Linear(17, 10), of.LayerNorm(10)]
    return of.Sequential(*body, of.Linear(10, 1, bias=False), of.Flatten(-2)).double()


def loss_of(net, step, rank=0, world=1):
    """Of this rank's share of a batch of 12 sequences."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (12, 4), generator=generator)
    goal = tokens.double().mean(1, keepdim=True).expand(-1, 4)
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    found = net(tokens[mine])
    return (found - goal[mine].to(found.dtype)).square().mean()


def optimizer_of(net, **options):
    matrices = [(n, p) for n, p in net.named_parameters() if n in ("1.weight", "3.weight")]
    taken = [n for n, _ in matrices]
    rest = [(n, p) for n, p in net.named_parameters() if n not in taken]
    low = {"params": matrices, "rank": 4, "update_proj_gap": 3, "lr": 0.02}
    return APOLLO([low, {"params": rest, "lr": 0.01}], **options)


def sharded_model(mesh, reshard=True, policy=None):
    """``policy``: of mixed precision; or "offload", by which shards and gradients are the CPU's."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    net, mesh = model(), mesh_of(mesh)
    options = {}
    if policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif policy:
        options["mp_policy"] = MixedPrecisionPolicy(**policy)
    for layer in (net[1], net[3]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def fit(net, optimizer, steps, rank=0, world=1):
    """Losses of the whole batch, which ranks share."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(net, step, rank, world)
        loss.backward()
        held = [p.grad is not None for p in net.parameters()]
        assert not any(held) if optimizer.gradient_release else all(held)
        optimizer.step()
        if world > 1:
            loss = loss.detach() / world
            distributed.all_reduce(loss)
        losses.append(float(loss.detach()))
    return losses


def fsdp(mesh, steps, options, release=False, policy=None):
    """Losses, weights and state of a model that fully_shard has cut."""
    net = sharded_model(mesh, policy=policy)
    optimizer = optimizer_of(net, **options)
    if release:
        optimizer.attach(net)
    losses = fit(net, optimizer, steps, distributed.get_rank(), distributed.get_world_size())
    return losses, contents(net, optimizer)


def narrow_fsdp(steps, release, options):
    """The same in float32, which kernels take; and the modules whose batches stepped."""
    net = sharded_model((2,)).float()
    optimizer = optimizer_of(net, **options)
    if release:
        optimizer.attach(net)
    losses = fit(net, optimizer, steps, distributed.get_rank(), distributed.get_world_size())
    plans = [unit.plan for unit in optimizer._runtime.units if unit.plan is not None]
    took = {type(work.batch).__module__.split(".")[1] for plan in plans for work in plan.works}
    return losses, contents(net, optimizer), took


def contents(net, optimizer):
    found = {}
    for name, p in net.named_parameters():
        found[name, "weight"] = full(p.detach())
        for key, value in optimizer.state[p].items():
            found[name, key] = full(value) if isinstance(value, torch.Tensor) else value
    return found


def one_process(steps, options):
    net = model()
    optimizer = optimizer_of(net, **options)
    return fit(net, optimizer, steps), contents(net, optimizer)


# ---- checkpoints ---------------------------------------------------------------------------------


def stores(net, optimizer, flat=False):
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": of.get_model_state_dict(net),
        "optimizer": of.get_optimizer_state_dict(net, optimizer, options=options),
    }


def save(folder, mesh, steps, how="save"):
    """Trains, saves by torch.distributed.checkpoint, trains on: losses, and contents when saved."""
    from torch.distributed import checkpoint

    rank, world = distributed.get_rank(), distributed.get_world_size()
    net = sharded_model(mesh)
    optimizer = optimizer_of(net)
    fit(net, optimizer, range(steps), rank, world)
    saved = contents(net, optimizer)
    content = stores(net, optimizer, flat=how == "flat")
    if how == "async":
        checkpoint.async_save(content, checkpoint_id=folder).result()
    else:
        checkpoint.save(content, checkpoint_id=folder)
    return fit(net, optimizer, range(steps, steps + 4), rank, world), saved


def load(folder, mesh, steps, how="save"):
    """Loads what ``save`` has saved, on whatever number of ranks; without a mesh into plain
    tensors. Contents then, and losses from there on."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as of

    rank, world = distributed.get_rank(), distributed.get_world_size()
    net = sharded_model(mesh) if mesh else model()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    optimizer = optimizer_of(net, seed=5)
    content = stores(net, optimizer, flat=how == "flat")
    checkpoint.load(content, checkpoint_id=folder)
    options = of.StateDictOptions(flatten_optimizer_state_dict=how == "flat")
    of.set_model_state_dict(net, content["model"])
    of.set_optimizer_state_dict(net, optimizer, content["optimizer"], options=options)
    found = contents(net, optimizer)
    return fit(net, optimizer, range(steps, steps + 4), rank, world), found


def whole_states(mesh, steps, given=None):
    """The full state dicts of a sharded run on rank 0; or a run that begins with ``given`` ones."""
    from torch.distributed.checkpoint import state_dict as of

    rank, world = distributed.get_rank(), distributed.get_world_size()
    net = sharded_model(mesh)
    optimizer = optimizer_of(net)
    if given is not None:
        options = of.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        mine = given if rank == 0 else ({}, {})
        of.set_model_state_dict(net, mine[0], options=options)
        of.set_optimizer_state_dict(net, optimizer, mine[1], options=options)
        found = contents(net, optimizer)
        return fit(net, optimizer, range(steps, steps + 3), rank, world), found
    losses = fit(net, optimizer, range(steps), rank, world)
    options = of.StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = of.get_model_state_dict(net, options=options)
    return losses, states, of.get_optimizer_state_dict(net, optimizer, options=options)


def own_state_dict(mesh, steps):
    """A plain state_dict() of whole tensors, loaded into a sharded optimizer: each rank takes its
    part. The contents then."""
    plain = model()
    optimizer = optimizer_of(plain)
    fit(plain, optimizer, range(steps))
    net = sharded_model(mesh)
    other = optimizer_of(net)
    other.load_state_dict(optimizer.state_dict())
    return contents(net, other), contents(plain, optimizer)


def layouts(folder, groups, mesh, saves):
    """Saves a run of a case after three steps, or loads it into another one; the contents then and
    after a fourth step."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as of

    case = Case(groups, "float64", mesh)
    holder = torch.nn.ParameterDict({f"p{i}": p for i, p in enumerate(case.params)})
    with torch.no_grad():
        if saves:
            case.train(range(3))
        content = {"model": of.get_model_state_dict(holder)}
        content["optimizer"] = of.get_optimizer_state_dict(holder, case.optimizer)
        if saves:
            checkpoint.save(content, checkpoint_id=folder)
        else:
            checkpoint.load(content, checkpoint_id=folder)
            of.set_model_state_dict(holder, content["model"])
            of.set_optimizer_state_dict(holder, case.optimizer, content["optimizer"])
        before = case.result()
        case.step(3)
        return before, case.result()


# ---- what a step sends ---------------------------------------------------------------------------


def kind_of(operator):
    """Of a collective, whatever its variant is called: allreduce_, _allgather_base_, ..."""
    name = operator.replace("_", "")
    kinds = {"all_reduce", "reduce_scatter", "all_gather"}
    return next((kind for kind in kinds if kind.replace("_", "") in name), operator)


class Counted(TorchDispatchMode):
    """Bytes of the whole side of every collective, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}
        self.calls = dict(self.bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for kind in self.bytes:
            if function.namespace == "c10d" and kind_of(function.__name__) == kind:
                tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
                self.bytes[kind] += max(t.numel() * t.element_size() for t in tensors)
                self.calls[kind] += 1
        return function(*args, **(kwargs or {}))


def sent(groups, mesh, options):
    """Of a warm step: bytes and number of collectives, and what the report says of it."""
    from torch.distributed.tensor.debug import CommDebugMode

    with torch.no_grad():
        case = Case(groups, "float32", mesh, **options).train(range(2))
        with CommDebugMode() as calls:
            case.optimizer.step()
        with Counted() as counted:
            case.optimizer.step()
    report = case.optimizer.memory_report()
    numbers = {kind_of(str(op)): n for op, n in calls.get_comm_counts().items() if n}
    state = sum(
        v.to_local().nbytes if hasattr(v, "to_local") else v.nbytes
        for own in case.optimizer.state.values()
        for v in own.values()
        if isinstance(v, torch.Tensor)
    )
    return counted.bytes, numbers, report, state


# ---- the example ---------------------------------------------------------------------------------


def pretrain(examples, arguments):
    """The script's ``main`` on every rank: its exit status and the log that it wrote."""
    import sys

    if examples not in sys.path:
        sys.path.insert(0, examples)
    import pretrain as script

    return script.main(arguments)


def interrupted(examples, arguments, step):
    """The same, with a SIGTERM that reaches rank 1 alone during that step."""
    import os
    import signal
    import sys

    if examples not in sys.path:
        sys.path.insert(0, examples)
    import training

    original = training.Run.train_step

    def train_step(self):
        original(self)
        if self.step == step and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    training.Run.train_step = train_step
    try:
        return pretrain(examples, arguments)
    finally:
        training.Run.train_step = original
