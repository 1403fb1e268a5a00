"""One process or many: the process group, a model spread over its ranks, and whole tensors of their parts.

With ddp each rank holds the whole model. With fsdp each rank holds a part of each parameter, its gradient and
its moments, and a layer is gathered while it computes.
"""
import contextlib
import os
import sys
import time
from datetime import timedelta

from configurator import ConfigError, one_line

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard


def on_cuda(kind):
    """Whether the setting device=`kind` means a GPU. Raises ConfigError where it does and there is none."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: torch sees no GPU here")
    return kind != "cpu" and torch.cuda.is_available()


def device_of(kind):
    """The device of this process for the setting device=`kind`. Raises ConfigError as on_cuda does."""
    if not on_cuda(kind):
        return torch.device("cpu")
    torch.cuda.set_device(device := torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    return device


def ranks():
    """(rank of this process, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def process_group(kind, timeout_seconds):
    """Yields the device for the setting device=`kind`; under torchrun, within a process group.

    There the first rank that fails prints its error, with its number, and ends with status 2, and the ranks
    that fail with it are silent. A rank that waits longer than timeout_seconds for another one fails.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device_of(kind)
        return
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun --max_restarts keeps its store, with the addresses of ranks that are gone and their errors.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    try:
        device = device_of(kind)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world, timeout=timedelta(seconds=timeout_seconds))
        yield device
    except Exception as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        with contextlib.suppress(RuntimeError):  # torchrun's store may be gone too
            if store.add("errors", 1) > 1:
                raise SystemExit(2)
        if not lost and not isinstance(error, (ConfigError, OSError, MemoryError, torch.OutOfMemoryError)):
            error.add_note(f"train.py: rank {rank} failed")
            raise
        text = "another rank has gone; --resume goes on from the last checkpoint" if lost else one_line(error)
        print(f"train.py: rank {rank}: {text}", file=sys.stderr)
        raise SystemExit(2)
    finally:
        # Gloo's thread needs Python's lock to let go of the last sum. Python at its end holds the lock and
        # waits for that thread, so both would wait for ever (torch 2.13).
        time.sleep(0.2)
        with contextlib.suppress(RuntimeError, AssertionError):  # there may be no group yet
            dist.destroy_process_group()


def any_rank(flag, device):
    """Whether `flag` is true on a rank. All ranks ask at the same place."""
    if dist.is_initialized():
        flag = torch.tensor(float(bool(flag)), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def compiled(model, by_layer=False):
    """A Transformer as it is to be called, compiled: whole, or a layer at a time where it is deep. Whole is
    faster by a tenth in small models, but takes longer with each layer. Parameters keep their names."""
    torch._dynamo.config.recompile_limit = 64  # a process of a study compiles many shapes
    if len(model.layers) <= 8 and not by_layer:
        return torch.compile(model, dynamic=False)
    for layer in model.layers:  # they share the compiled code
        layer.compile(dynamic=False)
    return model


# ---------------------------------------------------------------------------------------------------------
# FSDP

def shard(model, device, dtype, cpu_offload):
    """Spread a Transformer that has no memory yet over all ranks by FSDP2, layer by layer, in place.

    dtype: that of matrix products, in which a layer's matrices are gathered; None: as the weights are. Under
    autocast alone each rank would keep a copy of all weights in that type for the backward pass. What one
    process computes in fp32 is gathered in fp32, once for all layers: embedding, head, norms, biases and
    routers. Gradients are summed over ranks in fp32 after each pass, since the gradients of a whole model do
    not fit where its weights do not.
    """
    world = dist.get_world_size()

    def placement(p):  # dimension 0 alone would leave ranks idle where they outnumber the experts
        return Shard(next((d for d, size in enumerate(p.shape) if size % world == 0), 0))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    options = {"mesh": dist.init_device_mesh(device.type, (world,)), "shard_placement_fn": placement,
               "offload_policy": offload}
    matrices = {p for name, p in model.named_parameters()
                if name.startswith("layers.") and p.dim() > 1 and not name.endswith("mlp.gate.weight")}
    fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=matrices,
                reshard_after_forward=False, **options)
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy, ignored_params=set(model.parameters()) - matrices, **options)


def whole(t):
    """The tensor t of which this rank may hold a part only. All ranks ask at the same place."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def fill(t, write):
    """Let write(tensor) fill t. Where ranks hold parts of t, it fills a copy on the CPU, of which each rank
    keeps its part."""
    if not isinstance(t, DTensor):
        return write(t)
    copy = torch.empty(t.shape, dtype=t.dtype)
    write(copy)
    (rank, world), dim, local = ranks(), t.placements[0].dim, t.to_local()
    start = min(rank * -(-t.shape[dim] // world), t.shape[dim])
    local.copy_(copy.narrow(dim, start, local.shape[dim]))


def gather(local, shape, dim, group):
    """On rank 0 the tensor of `shape`, of which each rank holds `local` along dimension `dim`; else None."""
    rank, world = ranks()
    missing = -(-shape[dim] // world) - local.shape[dim]  # of equal parts, which gather wants
    local = F.pad(local, (0, 0) * (len(shape) - 1 - dim) + (0, missing)) if missing else local.contiguous()
    parts = None if rank else local.new_empty((world, *local.shape))
    dist.gather(local, parts if parts is None else list(parts), group=group)
    return None if rank else parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, shape[dim])
