"""Times a kernel on a machine behind TVM's RPC: a tracker there knows a server, `python -m tvm.exec.rpc_server`.

Data are packed here and sent once. No graph can be captured through a session: TVM's own timer over there makes one
call at a time and flushes the cache before each. A launch is in every time, which leaves their order as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tvm
from tvm import rpc

from tvm_sparse.errors import Refusal
from tvm_sparse.formats import FormatChoice
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.targets import MACHINES
from tvm_sparse.tune.cpu import check, packed_matrix, random_tokens
from tvm_sparse.tune.measuring import ROUNDS, Job
from tvm_sparse.tune.options import Server

_TIMEOUT = 3600  # seconds until the tracker takes the machine back


@dataclass(frozen=True)
class RemoteMeter:
    name: str
    server: Server

    def machine(self) -> str:
        device = _device(self.server, MACHINES[self.name].device)
        if MACHINES[self.name].is_gpu and not device.exist:
            raise Refusal(f"--rpc: {self.server.key} at {self.server.host}:{self.server.port} has no GPU")
        return str(device.device_name or f"the CPU of {self.server.key}")

    def isa(self, probe: Path) -> str:
        return CPU_ISAS[_load(self.server, probe)["tvm_sparse_isa"]()]

    def measure(self, job: Job) -> tuple[float, ...]:
        spec, library = KernelSpec.from_json(job.spec), Path(job.library)
        module = _load(self.server, library)
        device = _device(self.server, spec.device)
        flush = 4 * MACHINES[self.name].l2
        timer = module.time_evaluator(spec.name, device, number=1, repeat=3 * ROUNDS, cache_flush_bytes=flush)
        x, seconds = _send(random_tokens(spec), device), []
        for sparsity in job.sparsities:
            buffers = _buffers(self.server, spec.device, (spec.n, spec.k), sparsity, spec.choice)
            y = torch.full((spec.m or 1, spec.n), torch.nan).to(getattr(torch, spec.out_dtype))
            out = _send(y, device)
            module[spec.name](x, *buffers, out)
            out.copyto(tvm.runtime.from_dlpack(y))
            check(spec, sparsity, y)
            seconds.append(median(timer(x, *buffers, out).results))
        _session(self.server).remove(library.name)
        return tuple(seconds)


@lru_cache(maxsize=1)
def _session(server: Server) -> Any:
    try:
        return rpc.connect_tracker(server.host, server.port).request(server.key, session_timeout=_TIMEOUT)
    except Exception as fault:
        where, why = f"{server.host}:{server.port}/{server.key}", str(fault).strip().splitlines()[-1]
        way = f"python -m tvm.exec.rpc_server --tracker HOST:PORT --key {server.key} registers a machine"
        raise Refusal(f"--rpc {where}: no session ({why}); {way}") from fault


def _device(server: Server, kind: str) -> Any:
    return _session(server).device(kind, 0)


def _load(server: Server, library: Path) -> Any:
    _session(server).upload(str(library))
    return _session(server).load_module(library.name)


def _send(tensor: torch.Tensor, device: Any) -> Any:
    here = tvm.runtime.from_dlpack(tensor.contiguous())
    return here.copyto(tvm.runtime.empty(here.shape, here.dtype, device))


@lru_cache(maxsize=4)
def _buffers(
    server: Server, kind: str, shape: tuple[int, int], sparsity: float, choice: FormatChoice
) -> tuple[Any, ...]:
    packed = packed_matrix(shape, sparsity, choice)
    return tuple(_send(tensor, _device(server, kind)) for tensor in packed.buffers.values())
