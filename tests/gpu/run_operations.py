"""Every model operation against float64 on fresh random data: run_operations.py --library FILE [SHAPE ...]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import reference  # noqa: E402
import torch  # noqa: E402
from cases import SHAPES, Shape  # noqa: E402
from host import DEVICE, Output, library_of, load, relative_error  # noqa: E402
from torch.nn.functional import silu  # noqa: E402

CONTEXT = 300
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3}
CHUNKED = 1e-3  # the delta rule of many tokens: float32 in and out, float16 products


class Checks:
    """The operations of one shape; prefill runs one sequence of `n` tokens, decode one token of each of them."""

    def __init__(self, shape: Shape, get) -> None:
        self.s, self.get = shape, get
        self.dtype = getattr(torch, shape.dtype)
        self.results: list[tuple[str, float, bool]] = []

    def random(self, *size: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device=DEVICE) * scale).to(dtype or self.dtype)

    def floats(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        return self.random(*size, dtype=torch.float32, scale=scale)

    def call(self, name: str, *arguments) -> None:
        self.get(f"{self.s.name}_{name}")(
            *(a.tensor if isinstance(a, Output) else a for a in arguments)
        )
        torch.cuda.synchronize()
        for output in arguments:
            assert not isinstance(output, Output) or output.unharmed(), f"{name}: outside the output"

    def note(self, name: str, out: torch.Tensor, wanted: torch.Tensor, tolerance: float | None = None) -> None:
        error = relative_error(out, wanted)
        self.results.append((f"{self.s.name}_{name}", error, error <= (tolerance or TOLERANCE[out.dtype])))

    def run(self, tag: str, n: int) -> None:
        s, slot_value, past = self.s, self.s.batch - 1, 37
        slot = torch.tensor([slot_value], dtype=torch.int32, device=DEVICE)
        position = torch.arange(s.batch, dtype=torch.int32, device=DEVICE) * 3 + past
        sequences = [(slot_value, slice(0, n))] if tag == "p" else [(i, slice(i, i + 1)) for i in range(n)]
        owners = torch.tensor([slot_value] * n if tag == "p" else range(n), device=DEVICE)
        at = position[owners] + (torch.arange(n, device=DEVICE) if tag == "p" else 0)

        ids = torch.randint(s.vocab, (n,), dtype=torch.int32, device=DEVICE)
        table = self.random(s.vocab, s.hidden, dtype=torch.bfloat16)
        y = Output(n, s.hidden, dtype=self.dtype)
        self.call(f"embedding_{tag}", ids, table, y)
        self.note(f"embedding_{tag}", y.tensor, table[ids.long()].double())

        x, delta, w = self.random(n, s.hidden), self.random(n, s.hidden), self.floats(s.hidden)
        y = Output(n, s.hidden, dtype=self.dtype)
        self.call(f"rms_norm_{tag}", x, w, y)
        self.note(f"rms_norm_{tag}", y.tensor, reference.rms_norm(x, w, s.eps))
        y, total = Output(n, s.hidden, dtype=self.dtype), Output(n, s.hidden, dtype=self.dtype)
        self.call(f"add_rms_norm_{tag}", x, delta, w, total, y)
        summed = (x.double() + delta.double()).to(self.dtype)
        self.note(f"add_rms_norm_total_{tag}", total.tensor, summed.double())
        self.note(f"add_rms_norm_{tag}", y.tensor, reference.rms_norm(summed, w, s.eps))

        gate_up = self.random(n, 2 * s.inner, scale=4)
        y = Output(n, s.inner, dtype=self.dtype)
        self.call(f"silu_mul_{tag}", gate_up, y)
        gate, up = gate_up.double().chunk(2, 1)
        self.note(f"silu_mul_{tag}", y.tensor, silu(gate) * up)

        width = s.value_heads * s.value_dim
        mixed = self.random(n, s.channels + width + 2 * s.value_heads)
        taps, state = self.floats(s.channels, 4), self.floats(s.batch, 3, s.channels)
        wanted, wanted_state = [], state.double()
        for i, part in sequences:
            out, wanted_state[i] = reference.causal_conv(s, mixed[part], taps, state[i])
            wanted.append(out)
        y = Output(n, s.channels, dtype=torch.float32)
        self.call(f"causal_conv_{tag}", mixed, taps, slot, state, y)
        self.note(f"causal_conv_{tag}", y.tensor, torch.cat(wanted))
        self.note(f"causal_conv_state_{tag}", state, wanted_state)

        conv, a_log, dt = y.tensor.clone(), self.floats(s.value_heads), self.floats(s.value_heads)
        memory = self.floats(s.batch, s.value_heads, s.key_dim, s.value_dim)
        wanted, wanted_state = [], memory.double()
        for i, part in sequences:
            out, wanted_state[i] = reference.gated_delta(s, conv[part], mixed[part], a_log, dt, memory[i])
            wanted.append(out)
        o = Output(n, width, dtype=torch.float32)
        self.call(f"gated_delta_{tag}", conv, mixed, a_log, dt, slot, memory, o)
        chunked = CHUNKED if tag == "p" and self.dtype == torch.bfloat16 else None
        self.note(f"gated_delta_{tag}", o.tensor, torch.cat(wanted), chunked)
        self.note(f"gated_delta_state_{tag}", memory, wanted_state, chunked)

        w, y = self.floats(s.value_dim), Output(n, width, dtype=self.dtype)
        self.call(f"gated_norm_{tag}", o.tensor, mixed, w, y)
        self.note(f"gated_norm_{tag}", y.tensor, reference.gated_norm(s, o.tensor, mixed, w))

        if tag == "d":
            window = self.floats(s.batch, 3, s.channels)
            memory = self.floats(s.batch, s.value_heads, s.key_dim, s.value_dim)
            wanted, wanted_window, wanted_memory = [], window.double(), memory.double()
            for i, part in sequences:
                conv, wanted_window[i] = reference.causal_conv(s, mixed[part], taps, window[i])
                out, wanted_memory[i] = reference.gated_delta(s, conv, mixed[part], a_log, dt, memory[i])
                wanted.append(reference.gated_norm(s, out, mixed[part], w))
            y = Output(n, width, dtype=self.dtype)
            self.call("delta_step_d", mixed, taps, a_log, dt, w, window, memory, y)
            self.note("delta_step_d", y.tensor, torch.cat(wanted))
            self.note("delta_step_window_d", window, wanted_window)
            self.note("delta_step_state_d", memory, wanted_memory)

        qkv = self.random(n, 2 * (s.heads + s.kv_heads) * s.head_dim)
        q_norm, k_norm = self.floats(s.head_dim), self.floats(s.head_dim)
        caches = [self.random(s.batch, s.kv_heads, CONTEXT, s.head_dim) for _ in range(2)]
        q_in, gate, k_in, v_in = reference.split_qkv(s, qkv)
        wanted_k, wanted_v = (cache.double() for cache in caches)
        wanted_k[owners, :, at] = reference.rope(s, reference.rms_norm(k_in, k_norm, s.eps), at)
        wanted_v[owners, :, at] = v_in.double()
        q = Output(n, s.heads * s.head_dim, dtype=torch.float32)
        self.call(f"rope_append_{tag}", qkv, q_norm, k_norm, slot, position, *caches, q)
        self.note(
            f"rope_append_{tag}",
            q.tensor,
            reference.rope(s, reference.rms_norm(q_in, q_norm, s.eps), at).flatten(1),
        )
        self.note(f"rope_append_k_{tag}", caches[0], wanted_k)
        self.note(f"rope_append_v_{tag}", caches[1], wanted_v)

        heads = q.tensor.view(n, s.heads, s.head_dim)
        wanted = [
            reference.attention(
                s, heads[part], gate[part], caches[0][i], caches[1][i], int(position[i])
            )
            for i, part in sequences
        ]
        y = Output(n, s.heads * s.head_dim, dtype=self.dtype)
        self.call(f"attention_{tag}", q.tensor, qkv, slot, position, *caches, y)
        self.note(f"attention_{tag}", y.tensor, torch.cat(wanted))

        if tag == "d" and s.shares:
            for held in (0, 1, 15, 64, 65, 700, 8000):
                self.attention_step(qkv, q_norm, k_norm, held)

        before = position.clone()
        result = self.floats(1 if tag == "p" else n, s.vocab)
        kept = result.clone()
        self.call(f"advance_{tag}", ids, slot, position, result)
        before[slot_value if tag == "p" else slice(None)] += n if tag == "p" else 1
        right = torch.equal(before, position) and torch.equal(kept, result)
        self.results.append((f"{s.name}_advance_{tag}", 0.0, right))

        if tag == "d":
            logits = (self.floats(n, s.vocab) * 4).round() / 4  # many equal ones: the first wins
            values, places = Output(n, 128, dtype=torch.float32), torch.zeros(n, 128, dtype=torch.int32, device=DEVICE)
            chosen = torch.full((n,), -1, dtype=torch.int32, device=DEVICE)
            self.call("pick_part_d", logits, values, places)
            self.call("pick_join_d", values, places, chosen)
            first = torch.from_numpy(logits.cpu().numpy().argmax(1)).to(DEVICE)
            self.results.append((f"{s.name}_pick", 0.0, torch.equal(chosen.long(), first)))
            self.candidates(logits)

        if tag == "p":
            y = Output(1, s.hidden, dtype=self.dtype)
            self.call("last_row_p", x, y)
            self.note("last_row_p", y.tensor, x[-1:].double())
            logits = self.floats(n, s.vocab, scale=5)
            y = Output(n, dtype=torch.float32)
            self.call("log_probs_p", logits, ids, y)
            rows = torch.arange(n, device=DEVICE)
            self.note("log_probs_p", y.tensor, logits.double().log_softmax(1)[rows, ids.long()])

    def candidates(self, logits: torch.Tensor) -> None:
        """The largest logits, of equal ones the first, and the logarithm of the sum at a temperature of 0.8."""
        n, scale = len(logits), torch.full((1,), 1.25, device=DEVICE)
        keys = torch.zeros(n, 128, 64, dtype=torch.uint64, device=DEVICE)
        sums, values = Output(n, 128, 2, dtype=torch.float32), Output(n, 64, dtype=torch.float32)
        ids, log_sum = torch.full((n, 64), -1, dtype=torch.int32, device=DEVICE), Output(n, dtype=torch.float32)
        self.call("candidates_part_d", logits, scale, keys, sums)
        self.call("candidates_join_d", keys, sums, values, ids, log_sum)
        order = logits.sort(descending=True, stable=True)
        right = torch.equal(ids.long(), order.indices[:, :64]) and torch.equal(values.tensor, order.values[:, :64])
        self.results.append((f"{self.s.name}_candidates", 0.0, right))
        self.note("candidates_log_sum", log_sum.tensor, (logits.double() * 1.25).logsumexp(1))

    def attention_step(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, held: int) -> None:
        """Both kernels of a decode step, sequences of different lengths, what lies past them poisoned."""
        s, n = self.s, self.s.batch
        position = (held + torch.arange(n, device=DEVICE) * 37).int()
        caches = [self.random(n, s.kv_heads, held + 37 * n + 1, s.head_dim) for _ in range(2)]
        for i, length in enumerate(position.tolist()):
            for cache in caches:
                cache[i, :, length:] = float("nan")
        q, gate, k, v = reference.split_qkv(s, qkv)
        q = reference.rope(s, reference.rms_norm(q, q_norm, s.eps), position)
        k = reference.rope(s, reference.rms_norm(k, k_norm, s.eps), position)
        sums, marks = (Output(n, s.heads, s.shares, size, dtype=torch.float32) for size in (s.head_dim, 2))
        y, again = (Output(n, s.heads * s.head_dim, dtype=self.dtype) for _ in range(2))
        for out in (y, again):
            self.call("attention_part_d", qkv, q_norm, k_norm, position, *caches, sums, marks)
            self.call("attention_join_d", sums, marks, qkv, position, caches[0], out)
        wanted = []
        for i, length in enumerate(position.tolist()):
            self.note("attention_part_k", caches[0][i, :, length], k[i])
            self.note("attention_part_v", caches[1][i, :, length], v[i].double())
            part = slice(i, i + 1)
            wanted.append(reference.attention(s, q[part], gate[part], caches[0][i], caches[1][i], length))
        self.note(f"attention_step_{held}", y.tensor, torch.cat(wanted))
        self.results.append((f"{s.name}_attention_step_twice", 0.0, torch.equal(y.tensor, again.tensor)))


def main(library: str, *names: str) -> None:
    get = load(library)
    failed, worst, count = [], {}, 0
    for shape in SHAPES:
        if names and shape.name not in names:
            continue
        checks = Checks(shape, get)
        for n in (1, 2, 3, 70, 200):
            checks.run("p", n)
        checks.run("d", shape.batch)
        for name, error, right in checks.results:
            count += 1
            worst[name] = max(worst.get(name, 0.0), error)
            if not right:
                failed.append(f"{name}: {error:.2e}")
    for name, error in sorted(worst.items(), key=lambda item: -item[1])[:8]:
        print(f"{name:36} {error:.1e}")
    print(f"operations: {count - len(failed)} of {count} right", *failed, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    found, names = library_of(sys.argv[1:])
    main(found, *names)
