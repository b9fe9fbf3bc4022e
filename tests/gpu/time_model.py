"""Decode speed of a library built without weights, on random ones: python tests/gpu/time_model.py ARTEFACT

One matrix of every shape is packed and copied for each layer, so bytes are those of a real model. Prints the time of a
captured decode step and of the same step launched kernel by kernel, at a few positions, and what each kernel takes.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import tvm_ffi  # noqa: E402
from host import DEVICE, load  # noqa: E402

from tvm_sparse.bench.account import account  # noqa: E402
from tvm_sparse.bench.tables import render  # noqa: E402
from tvm_sparse.formats import FORMATS  # noqa: E402
from tvm_sparse.layout import make_layout  # noqa: E402
from tvm_sparse.models.config import ModelConfig  # noqa: E402


def random_params(facts: dict, names: list[str]) -> list[torch.Tensor]:
    layout = {param.name: param for param in make_layout(ModelConfig.from_json(facts["config"])).params}
    packed: dict[tuple, dict[str, torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    for name, param in layout.items():
        spelled = facts["plan"].get(name)
        if spelled is None:
            found[name] = torch.randn(param.shape, device=DEVICE) * 0.1
            continue
        key = (*param.shape, spelled)
        if key not in packed:
            w = torch.randn(param.shape, device=DEVICE) * 0.0111
            fmt = FORMATS[spelled.partition("(")[0]]
            if fmt.name != "dense":
                w *= w.abs() > torch.quantile(w.view(-1)[: 1 << 22].abs(), facts["pruning"]["sparsity"])
            options = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", spelled)}
            packed[key] = fmt.pack(w.bfloat16(), fmt.choice(**options)).buffers
        for buffer, tensor in packed[key].items():
            found[f"{name}.{buffer}" if buffer else name] = tensor.clone()
    return [found[name] for name in names]


def main(artefact: str) -> None:
    folder = Path(artefact)
    facts = json.loads((folder / "tvm_sparse.json").read_text())
    names = json.loads((folder / "library.json").read_text())["params"]
    vm = load(str(folder / "lib.so"))("vm_load_executable")()
    vm["vm_initialization"](2, 0, 2, 1, 0, 2)

    def array(tensors: list[torch.Tensor]):
        return tvm_ffi.convert([tvm_ffi.from_dlpack(tensor) for tensor in tensors])

    torch.manual_seed(0)
    began = time.perf_counter()
    tensors = random_params(facts, names)
    params = array(tensors)
    torch.cuda.synchronize()
    size = sum(tensor.nbytes for tensor in tensors)
    print(f"{size / 1e9:.2f} GB of parameters in {time.perf_counter() - began:.1f} s")
    context = facts["context"]

    def zeros(shape: list, dtype: str = "int32") -> torch.Tensor:
        sizes = [context if extent == "context" else extent for extent in shape]
        return torch.zeros(sizes, dtype=getattr(torch, dtype), device=DEVICE)

    state = [zeros(each["shape"], each["dtype"]) for each in facts["state"]]
    states = array(state)
    ids, slot, position = zeros([facts["batch"]]), zeros([1]), zeros([facts["batch"]])
    results: list = []

    def step() -> None:
        results[:] = [vm["decode"](ids, slot, position, states, params)]

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    print(f"kernel by kernel: {(time.perf_counter() - began) / 20 * 1e3:.2f} ms a token")

    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        step()
    digests = []
    for _ in range(2):
        for tensor in (position, *state):
            tensor.zero_()
        for token in range(4):
            ids.fill_(100 + token)
            graph.replay()
        digests.append(torch.from_dlpack(results[0]).clone())
    best = digests[0][0].topk(3)
    print(f"after 4 tokens: {best.indices.tolist()} {[round(v, 4) for v in best.values.tolist()]}, |logits| "
          f"{float(digests[0].norm()):.4f}, two runs equal {torch.equal(*digests)}")  # fmt: skip

    for at in (0, 512, context - 64):
        position.fill_(at)
        for _ in range(3):
            graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(30):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        took = start.elapsed_time(end) / 30
        finite = bool(torch.isfinite(torch.from_dlpack(results[0])).all())
        print(f"captured, position {at}: {took:.3f} ms a token, {1e3 / took:.0f} tokens/s, finite {finite}")

    def replay(steps: int) -> None:
        for _ in range(steps):
            graph.replay()

    for at in (0, context - 64):
        position.fill_(at)
        rows = account(replay)
        print(render(rows, "md", {"position": at, "us": round(sum(row["us a step"] for row in rows), 1)}), flush=True)

    prompt = torch.randint(1000, (256,), dtype=torch.int32, device=DEVICE)
    position.fill_(0)
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        vm["prefill"](prompt, slot, position, states, params)
        torch.cuda.synchronize()
    print(f"prefill of 256 tokens: {(time.perf_counter() - began) * 1e3:.0f} ms")


if __name__ == "__main__":
    main(sys.argv[1])
