"""int8 weights as a tensor that looks like its bf16 (or float32) weight (paper, section 5.3).

    quantize_(model)     weights of nn.Linear, and of nn.Embedding if asked, become Int8Weight
    dequantize_(model)   and back

int8.py is the arithmetic. A layer dequantizes its own weight when it runs, forward and backward,
and keeps nothing of it; APOLLO's step updates the codes (reference.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from apollo_kernels import int8, int8_shards
from apollo_kernels._version import __version__
from apollo_kernels.distributed import is_sharded, local
from apollo_kernels.groups import LINEAR, choose_parameters

_aten = torch.ops.aten
_PART = {"cpu": 2**20}  # weights widened at a time: bounds the temporaries
_PART_ELSEWHERE = 2**24  # where each part costs launches


class Int8Weight(Tensor):
    """A weight [m, n] held as ``codes`` uint8 [m, n] and ``grid`` int32 [m, groups].

    To all who only read it, it is a tensor of its ``dtype``: an operation that does not know it
    gets the dequantized values. Of those that write, it knows ``copy_``. Some rows of it are one
    too (int8_shards.py), and so is ``new_zeros`` with its columns and dtype.

    padded: codes and grid of the rows that these are the first ones of, for fully_shard; or None.
    piece: it is one of the results of ``split``.
    """

    codes: Tensor
    grid: Tensor
    padded: tuple[Tensor, Tensor] | None = None
    piece: bool = False

    @staticmethod
    def __new__(cls, codes: Tensor, grid: Tensor, dtype: torch.dtype) -> Int8Weight:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=False
        )

    def __init__(self, codes: Tensor, grid: Tensor, dtype: torch.dtype):
        self.codes, self.grid = codes, grid

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "grid"], self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], dtype: torch.dtype, *_: Any
    ) -> Int8Weight:
        return cls(inner["codes"], inner["grid"], dtype)

    @property
    def group_size(self) -> int:
        return int8.group_size(self.codes.shape[1], self.grid.shape[1])

    @property
    def scale(self) -> Tensor:
        """[m, groups] float32."""
        return int8.scale_and_zero(self.grid)[0]

    @property
    def zero(self) -> Tensor:
        """[m, groups] float32: the code of 0."""
        return int8.scale_and_zero(self.grid)[1]

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What fully_shard sends to other ranks. (With the further arguments that it offers, it
        would refuse tensors of another shape than this one's wherever shards are padded.)"""
        codes, grid = self.padded or (self.codes, self.grid)
        return (codes, grid), grid

    def fsdp_post_all_gather(
        self, gathered: Any, grid: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]] | None:
        """The whole weight over the memory that fully_shard has gathered it in, as ``out`` is.
        On one rank it gathers the codes alone."""
        alone = len(gathered) == 1
        if out is None:
            return Int8Weight(gathered[0], grid.clone() if alone else gathered[1], dtype), ()
        if alone:
            out.grid.copy_(grid)  # type: ignore[attr-defined]
        return None

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph on disk depends on, beside the code: another version may compute
        otherwise."""
        shapes = tuple(self.codes.shape), tuple(self.grid.shape)
        return f"{type(self).__name__} {__version__} {shapes} {self.dtype} {self.device}"

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"group_size={self.group_size}, requires_grad={self.requires_grad})"
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """A plain tensor [m, n] in ``dtype``, by default in this one's."""
        dtype = dtype or self.dtype
        codes, grid = self.codes, self.grid
        part = _PART.get(codes.device.type, _PART_ELSEWHERE)
        if torch.compiler.is_compiling() or codes.numel() <= part:
            return int8.dequantize(codes, grid).to(dtype)
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        rows = max(1, part // codes.shape[1])
        for to, some, grids in zip(*(t.split(rows) for t in (out, codes, grid)), strict=True):
            to.copy_(int8.dequantize(some, grids))
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layer = _LAYERS.get(func)
        if layer is not None:
            return layer(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore
        kwargs = kwargs or {}
        known = _OPERATIONS.get(func)
        if known is not None and isinstance(args[0], Int8Weight):
            return known(*args, **kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and _holds_int8(value):
                raise NotImplementedError(
                    f"{func} would write into an int8 weight of shape {tuple(args[0].shape)}: "
                    "only copy_ and APOLLO's step do; apollo_kernels.dequantize_(model) undoes it"
                )
        args, kwargs = tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _holds_int8(value: Any) -> bool:
    several = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, Int8Weight) for v in several)


def is_int8(p: Tensor) -> bool:
    """Whether a parameter is an int8 weight, or a DTensor of such."""
    return isinstance(local(p), Int8Weight)


def stored(p: Tensor) -> tuple[Tensor, ...]:
    """The tensors whose memory holds a weight: ``(p,)``, or codes and grid."""
    return (p.codes, p.grid) if isinstance(p, Int8Weight) else (p,)


# ---- operations ----------------------------------------------------------------------------------


def _alias(w: Int8Weight) -> Int8Weight:
    return int8_shards.each(w, lambda t: t)


def _clone(w: Int8Weight, **_: Any) -> Int8Weight:
    return Int8Weight(w.codes.clone(), w.grid.clone(), w.dtype)


def _to_copy(w: Int8Weight, *, dtype: torch.dtype | None = None, **where: Any) -> Tensor:
    """To another device, or behind another dtype; float64 and integers are no weights to train."""
    dtype = dtype or w.dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        return _aten._to_copy.default(w.dequantize(), dtype=dtype, **where)
    where.pop("memory_format", None)
    return int8_shards.each(w, lambda t: _aten._to_copy.default(t, **where), dtype)


def _copy_(w: Int8Weight, source: Tensor, non_blocking: bool = False) -> Int8Weight:
    """From codes on a like grid as they are; from all else to the nearest."""
    if not (isinstance(source, Int8Weight) and source.grid.shape == w.grid.shape):
        source = quantized(source.expand(w.shape).to(w.device), w.group_size)
    w.codes.copy_(source.codes, non_blocking)
    w.grid.copy_(source.grid, non_blocking)
    return w


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    **int8_shards.OPERATIONS,
}


# ---- layers --------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """nn.functional.linear, which would keep the dequantized weight for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight.dequantize(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            # To torch.compile this is another weight than the forward's, which it would else keep.
            again = Int8Weight(weight.codes, weight.grid | 0, weight.dtype)
            for_x = grad @ again.dequantize(grad.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = rows.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias


class _Embedding(torch.autograd.Function):
    """nn.functional.embedding: only the rows that are asked for are dequantized."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Int8Weight, padding: int, by_count: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rest = weight.shape[0], padding, by_count
        rows = ids.reshape(-1)
        found = int8.dequantize(weight.codes[rows], weight.grid[rows])
        return found.to(weight.dtype).view(*ids.shape, weight.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        dense = _aten.embedding_dense_backward.default(grad, ids, *ctx.rest)
        return None, dense, None, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Int8Weight):  # another argument is one
        with torch._C.DisableTorchFunctionSubclass():
            return functional.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


def _embedding(
    input: Tensor,
    weight: Int8Weight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or sparse:
        raise NotImplementedError(
            f"an int8 embedding takes neither max_norm ({max_norm}) nor sparse gradients ({sparse})"
        )
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(input, weight, padding, scale_grad_by_freq)


_LAYERS: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
}


# ---- models --------------------------------------------------------------------------------------


@torch.no_grad()
def quantized(w: Tensor, group_size: int = 128) -> Int8Weight:
    """A weight [m, n] of any float dtype as int8, each value at the nearest code of its group."""
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    groups = -(-w.shape[1] // group_size)
    grid = torch.empty((w.shape[0], groups), dtype=torch.int32, device=w.device)
    rows = max(1, _PART.get(w.device.type, _PART_ELSEWHERE) // max(w.shape[1], 1))
    for some, *to in zip(*(t.split(rows) for t in (w, codes, grid)), strict=True):
        for part, found in zip(to, int8.quantize(some.float(), group_size), strict=True):
            part.copy_(found)
    return Int8Weight(codes, grid, w.dtype)


@torch.no_grad()
def quantize_(
    model: nn.Module,
    group_size: int = 128,
    targets: str | Iterable[str] = "linear",
    *,
    embeddings: bool = False,
) -> list[str]:
    """Turns weights of ``model`` into int8, in place: a byte per weight and 4 per group.

    Parameters stay the same objects: tied weights stay tied, and an optimizer that has them goes
    on. Frozen weights are quantized too. The model's state_dict holds plain tensors instead of each
    ``weight``: ``weight_codes`` and ``weight_grid``, so that torch.load(weights_only=True) and
    safetensors read it; loading also takes a ``weight`` and quantizes it.

    Args
        group_size: neighbours in a row that share scale and zero point; a power of two from 8 on.
        targets, embeddings: which weights of nn.Linear and nn.Embedding, as in ``param_groups``:
            by default of all linear layers but the output head; with ``embeddings`` also of
            embeddings and the head.
    Returns
        the names of the parameters that were turned.
    Raises
        ValueError: for a group size that cannot be; for targets that match nothing; with its name,
            for a target that cannot be int8 (three dimensions, another kind of layer, float64,
            not finite), and for a model whose parameters are DTensors: fully_shard comes after
            it. Nothing is changed then.
    """
    whole = isinstance(group_size, Integral) and not isinstance(group_size, bool)
    if not whole or group_size < int8.SMALLEST_GROUP or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two from 8 on, got {group_size!r}")
    if not isinstance(targets, str):
        targets = list(targets)
    owners = _owners(model)
    for name, shard in model.named_parameters():
        if is_sharded(shard):
            raise ValueError(
                f"parameter {name!r} is a DTensor, {tuple(shard.shape)}: call quantize_ before "
                "fully_shard; int8 weights do not go with tensor parallelism"
            )
    explicit = not isinstance(targets, str) or targets not in (*LINEAR, "all")
    chosen: dict[str, Tensor] = {}
    left: list[str] = []
    for choice in choose_parameters(model, targets, embeddings, frozen=True):
        p = choice.parameter
        if not choice.low_rank or isinstance(p, Int8Weight):
            continue
        reason = _why_not(p, owners[p])
        if reason is None:
            chosen[choice.name] = p
        elif explicit:
            raise ValueError(f"{choice.name} cannot be int8: {reason}")
        elif choice.batch_dims:
            left.append(choice.name)
    if not chosen and not any(isinstance(p, Int8Weight) for p in owners):
        raise ValueError(f"targets={targets!r} matches no weight of nn.Linear or nn.Embedding")
    for name, p in chosen.items():
        if not _finite(p):
            raise ValueError(f"{name} cannot be int8: it holds NaN or Inf")
    if left:
        warnings.warn(f"experts stay as they are, not int8: {', '.join(left)}", stacklevel=3)
    for p in chosen.values():
        _set(p, quantized(p.detach(), int(group_size)), owners[p])
        for module, _ in owners[p]:
            _keep_plain_state(module)
    return list(chosen)


@torch.no_grad()
def dequantize_(model: nn.Module) -> list[str]:
    """Turns every int8 weight of ``model`` into a plain one, in place; the names of those.

    Raises
        ValueError: for a model that fully_shard has cut, which holds on to what it has cut.
    """
    owners = _owners(model)
    for name, p in model.named_parameters():
        if is_sharded(p) and is_int8(p):
            raise ValueError(
                f"parameter {name!r} is cut into shards, and stays int8: dequantize_ goes before "
                "fully_shard. Load a full state dict of it into a model that is not sharded"
            )
    found = {name: p for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    for p in found.values():
        _set(p, p.dequantize(), owners[p])
        for module, _ in owners[p]:
            for name in (_CODES, _GRID):
                module._buffers.pop(name, None)
    return list(found)


def refuse_lost(model: nn.Module) -> None:
    """Raises ValueError if weights of ``model`` were int8 and have become shards of plain numbers:
    what cuts weights in another way than by rows copies them into tensors of its own."""
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if _CODES in module._buffers and is_sharded(weight) and not is_int8(weight):
            raise ValueError(
                f"parameter {f'{path}.weight'.lstrip('.')!r} was int8, and is now cut into shards "
                f"of plain numbers, placed as {weight.placements!r}: int8 weights go with "
                "fully_shard if it cuts rows, Shard(0), and not with tensor parallelism or "
                "to_empty. Leave quantize_ out, or use DistributedDataParallel"
            )


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append((module, key))
    return owners


def _why_not(p: Tensor, owners: Sequence[tuple[nn.Module, str]]) -> str | None:
    if p.dim() != 2:
        return f"it has {p.dim()} dimensions, and int8 weights have two"
    if not p.is_floating_point() or p.dtype == torch.float64:
        return f"it is {p.dtype}"
    for module, key in owners:
        if key != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
            return f"it is {key!r} of a {type(module).__name__}, not of nn.Linear or nn.Embedding"
        if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
            return "its embedding has sparse gradients or a max_norm"
    return None


def _finite(p: Tensor) -> bool:
    """Whether all numbers are; of a tensor without numbers (meta, fake) nobody can tell."""
    if p.device.type == "meta" or isinstance(p, FakeTensor):
        return True
    return all(bool(torch.isfinite(part).all()) for part in p.detach().split(2**12))


def _set(p: Tensor, value: Tensor, owners: Sequence[tuple[nn.Module, str]]) -> None:
    """Makes ``p`` a parameter with this value and the same object, whoever refers to it."""
    other, grad = nn.Parameter(value, requires_grad=p.requires_grad), p.grad
    if any(isinstance(part, FakeTensor) for part in (*stored(p), *stored(value))):
        for module, key in owners:  # fake tensors are referred to weakly, and cannot be swapped
            module._parameters[key] = other
        other.grad = grad
        return
    p.grad = None
    try:
        torch.utils.swap_tensors(p, other)
    except RuntimeError as error:
        raise RuntimeError(
            f"a weight of shape {tuple(p.shape)} cannot change its format in place, since something"
            f" else refers to it: quantize a model before it is compiled ({error})"
        ) from error
    finally:
        p.grad = grad


# ---- state dicts ---------------------------------------------------------------------------------

_CODES, _GRID = "weight_codes", "weight_grid"


def _keep_plain_state(module: nn.Module) -> None:
    """From now on the module's state_dict holds plain tensors for a weight that is int8.

    torch.distributed.checkpoint looks up what each key of it names. So the two names are those of
    buffers, which are None and hold nothing.
    """
    if _write_state not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_write_state)
        module.register_load_state_dict_pre_hook(_read_state)
    for name in (_CODES, _GRID):
        module.register_buffer(name, None)


def _write_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state.get(prefix + "weight")
    if isinstance(weight, Tensor) and is_int8(weight):
        del state[prefix + "weight"]
        state[prefix + _CODES], state[prefix + _GRID] = int8_shards.parts(weight)


def _read_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts together what ``_write_state`` took apart; quantizes a plain weight."""
    own: Any = module.weight
    key, here = prefix + "weight", local(own)
    if not isinstance(here, Int8Weight):
        return
    codes, grid = (state.get(prefix + part) for part in (_CODES, _GRID))
    if codes is None and grid is None:
        plain = state.get(key)
        if isinstance(plain, Tensor) and plain.shape == own.shape and not is_int8(plain):
            rows = int8_shards.local_part(plain, own, key)
            state[key] = int8_shards.like(quantized(rows.to(own.dtype), here.group_size), own)
        return
    with contextlib.suppress(KeyError):
        del state[prefix + _CODES], state[prefix + _GRID]
    found, wanted = (_told(codes), _told(grid)), tuple(map(_told, int8_shards.parts(own)))
    if found != wanted:
        raise ValueError(
            f"{key}: codes must be {wanted[0]} and the grid {wanted[1]} (groups of "
            f"{here.group_size}), got {found[0]} and {found[1]}"
        )
    parts: tuple[Any, Any] = (codes, grid)
    codes, grid = (int8_shards.local_part(t, own, key).contiguous() for t in parts)
    state[key] = int8_shards.like(Int8Weight(codes, grid, own.dtype), own)


def _told(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
