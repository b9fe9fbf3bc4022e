"""Weights are counted exactly, in one streamed pass, and the figures are those of a direct computation."""

import json
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tvm_sparse.checkpoint import VisionTower, open_checkpoint, stored_tensors
from tvm_sparse.checkpoint.synthetic import SyntheticCheckpoint
from tvm_sparse.errors import Refusal, run_command
from tvm_sparse.formats import FORMATS
from tvm_sparse.layout import make_layout
from tvm_sparse.measure import sweep as sweeping
from tvm_sparse.measure.__main__ import main
from tvm_sparse.measure.components import count_by_name
from tvm_sparse.measure.figures import Asked
from tvm_sparse.measure.magnitudes import FINITE, Magnitudes, count
from tvm_sparse.measure.outputs import output_similarity
from tvm_sparse.measure.report import measure
from tvm_sparse.measure.zero_units import maxima
from tvm_sparse.models.config import REGISTERED, ModelConfig
from tvm_sparse.pruning import PrunedWeights, Pruner

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = EXAMPLES / "tiny-qwen3.5"
ASKED = Asked((0.001, 0.005, 0.01, 0.02), (0.5, 0.75, 0.9))

# The published 27B as it was first measured: tensors, weights and the share of |w| under 0.001, 0.005, 0.01, 0.02.
FIRST_MEASURED = {
    "down_proj": (65, 5_793_382_400, 7.4, 35.8, 64.3, 92.8),
    "gate_proj": (65, 5_793_382_400, 7.2, 35.0, 63.3, 92.3),
    "up_proj": (65, 5_793_382_400, 7.3, 35.2, 63.5, 92.5),
    "q_proj": (17, 1_069_547_520, 5.7, 27.9, 51.9, 82.8),
    "k_proj": (17, 89_128_960, 6.0, 29.4, 54.1, 84.1),
    "v_proj": (17, 89_128_960, 4.8, 23.7, 44.7, 74.2),
    "o_proj": (17, 534_773_760, 5.3, 25.9, 48.7, 79.6),
    "other": (605, 6_070_652_272, 5.4, 26.4, 49.6, 80.9),
}


def scaled_27b() -> SyntheticCheckpoint:
    """The 27B with every tensor it has, a sixteenth as wide."""
    config = ModelConfig(**{
        **vars(REGISTERED["qwen3.5-27b"]), "vocab_size": 512, "hidden_size": 320, "intermediate_size": 1088,
        "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    })  # fmt: skip
    return SyntheticCheckpoint(config, tower=VisionTower(27, 72, 269, (3, 2, 4, 4), 144))


@pytest.fixture(scope="module")
def scaled():
    return measure(scaled_27b(), "scaled", ASKED)


@pytest.fixture(scope="module")
def tiny():
    return measure(open_checkpoint(str(TINY)), "tiny", ASKED)


def magnitudes(weight):
    return Magnitudes(count(bits(weight))[:FINITE].numpy())


def bits(weight):
    return weight.view(torch.int16) & 0x7FFF


def test_the_27b_counted_from_names_and_shapes_alone():
    tensors = stored_tensors(REGISTERED["qwen3.5-27b"])
    assert (len(tensors), sum(prod(t.shape) for t in tensors)) == (1199, 27_781_427_952)
    rows = count_by_name(tensors)
    assert rows == {name: row[:2] for name, row in FIRST_MEASURED.items()}
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == [868, 25_233_378_672]


def test_the_08b_s_mtp_layer():
    mtp = [t for t in stored_tensors(REGISTERED["qwen3.5-0.8b"]) if t.part == "MTP"]
    assert (len(mtp), sum(prod(t.shape) for t in mtp)) == (15, 20_452_864)


def test_synthetic_weights_give_the_first_measurement_s_table(scaled):
    for name, (tensors, _, *shares) in FIRST_MEASURED.items():
        row = scaled["by_name"][name]
        assert row["tensors"] == tensors, name
        assert [100 * share for share in row["below"].values()] == pytest.approx(shares, abs=1.5), name
    assert scaled["by_name"]["in all"]["tensors"] == 868
    assert len(scaled["tensors"]) == 1199


def test_small_is_not_zero(scaled):
    """A normal distribution explains the small weights, and says so."""
    row = scaled["by_name"]["down_proj"]
    assert row["below"]["0.01"] == pytest.approx(row["normal_below"]["0.01"], abs=0.002)
    assert row["below"]["0.01"] > 0.6 and row["zeros"] / row["weights"] < 1e-5
    assert scaled["by_name"]["in all"]["distance_from_normal"] < 0.002


def test_distance_from_normal_of_other_distributions():
    normal, uniform = torch.randn(400_000), torch.rand(400_000) * 2 - 1
    sparse = normal * (torch.rand(400_000) < 0.25)
    found = [magnitudes(w.bfloat16()) for w in (normal, uniform, sparse)]
    assert found[0].distance(found[0].normal) < 0.003
    # of |w| uniform on [0, 1], rms 1/sqrt(3): the gap is widest where the densities are equal
    x = np.linspace(0, 1, 10001)
    share = torch.special.erf(torch.tensor(x * sqrt(1.5))).numpy()
    assert found[1].distance(found[1].normal) == pytest.approx(np.abs(share - x).max(), abs=0.003)
    assert found[2].distance(found[2].normal) == pytest.approx(0.75, abs=0.005)
    assert [m.excess_kurtosis for m in found] == pytest.approx([0, -1.2, 9], abs=0.25)


@pytest.mark.parametrize("sparsity", (0.001, 0.37, 0.5, 0.75, 0.999))
def test_cut_is_what_the_pruner_does(sparsity):
    weight = (torch.randn(96, 200) * 0.02).bfloat16()
    cut, pruned = magnitudes(weight).cut(sparsity), weight.clone()
    Pruner("magnitude", sparsity).matrix("w", pruned)
    dropped = weight.double() - pruned.double()
    assert cut.error == pytest.approx(float(dropped.norm() / weight.double().norm()), rel=1e-12)
    assert cut.threshold == float(dropped.abs().max())
    assert magnitudes(weight).below(cut.threshold) < sparsity
    assert cut.share == pytest.approx(float((weight.double().abs() <= cut.threshold).double().mean()), abs=1e-12)


@pytest.mark.parametrize("shape", ((64, 48), (37, 50), (3, 5), (16, 1)))
def test_zero_units_are_counted_exactly(shape):
    weight = (torch.randn(shape) * torch.rand(shape[0], 1) ** 4).bfloat16()
    weight[0] = 0
    cut = magnitudes(weight).cut(0.7)
    small = (weight.double().abs() <= cut.threshold).numpy()
    found = maxima(bits(weight)).units(cut, shape)
    assert (found["row"].zero, found["column"].zero) == (small.all(1).sum(), small.all(0).sum())
    for side in (4, 16):
        grid = [small[i : i + side, j : j + side] for i in range(0, shape[0], side) for j in range(0, shape[1], side)]
        units = found[f"{side}x{side}"]
        assert (units.zero, units.of) == (sum(block.all() for block in grid), len(grid))
        assert units.chance == pytest.approx(sum(cut.share**block.size for block in grid))


def test_exponents_and_their_entropy():
    found = magnitudes(torch.tensor([1.0, -1.5, 2.0, 4.0, 0.0, -0.0]).bfloat16())
    assert {e - 127: n for e, n in enumerate(found.exponents().tolist()) if n} == {0: 2, 1: 1, 2: 1}
    assert found.exponent_entropy == pytest.approx(1.5)
    assert found.zeros == 2


def test_every_weight_of_a_folder_is_in_the_figures(tiny):
    checkpoint = open_checkpoint(str(TINY))
    for facts in tiny["tensors"]:
        weight = checkpoint.tensor(facts["name"].removeprefix("model.language_model.").removeprefix("model.")).double()
        assert facts["weights"] == weight.numel()
        assert facts["rms"] == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-2), facts["name"]
        assert facts["below"]["0.01"] == pytest.approx(float((weight.abs() < 0.01).double().mean()), abs=0.01)


def test_tiles_and_threads_change_nothing(tiny, monkeypatch):
    monkeypatch.setattr(sweeping, "MEMORY", 40_000)
    monkeypatch.setattr(sweeping, "CHUNK", 3_000)
    monkeypatch.setattr(sweeping, "ROWS", 32)
    monkeypatch.setattr(sweeping, "STRIP", 1_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = measure(open_checkpoint(str(TINY)), "tiny", ASKED)
    for name, facts in tiny["similarity"]["projections"].items():
        assert np.allclose(facts["cosine"], again["similarity"]["projections"][name]["cosine"], atol=2e-5)
    del again["similarity"], (rest := dict(tiny))["similarity"]
    assert json.dumps(again) == json.dumps(rest)


def test_memory_of_the_27b_is_bounded():
    tiles = list(sweeping._tiles(stored_tensors(REGISTERED["qwen3.5-27b"])))
    held = [2 * len(t.tensors) * (t.stop - t.start) * prod(t.tensors[0].shape[1:]) for t in tiles]
    assert max(held) <= sweeping.MEMORY
    assert sum(held) == 2 * 27_781_427_952  # every weight once


def test_similarity_of_weights():
    class Twin(SyntheticCheckpoint):
        """Layer 5 is layer 1 again; layer 7 is the negative of layer 3, but for its MLP."""

        def stored_rows(self, tensor, start, stop):
            name = tensor.short
            other = {"layers.5.": "layers.1.", "layers.7.": "layers.3."}.get(name[:9])
            if tensor.part != "text" or other is None or (name[:9] == "layers.7." and "mlp" in name):
                return super().stored_rows(tensor, start, stop)
            sign = -1 if name[:9] == "layers.7." else 1
            return sign * self.rows(name.replace(name[:9], other), start, stop)

    checkpoint = Twin(open_checkpoint(str(TINY)).config)
    found = measure(checkpoint, "twin", ASKED)["similarity"]
    assert found["candidates"] == [{"kind": "linear_attention", "layers": [1, 5], "cosine": pytest.approx(1)}]
    assert found["projections"]["self_attn.q_proj"]["cosine"][0][1] == pytest.approx(-1)
    gate = found["projections"]["mlp.gate_proj"]
    assert gate["largest"]["layers"] == [1, 5] and gate["layers"] == list(range(8))
    a, b = (checkpoint.tensor(f"layers.{i}.mlp.gate_proj.weight").double().flatten() for i in (3, 7))
    assert gate["cosine"][3][7] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=2e-5)


def test_expected_bytes_are_what_packing_takes(tiny):
    checkpoint = open_checkpoint(str(TINY))
    params = [param for param in make_layout(checkpoint.config).params if param.kind == "projection"]
    weights = PrunedWeights(checkpoint, Pruner("magnitude", 0.75), [s for p in params for s in p.sources])
    as_for_a_cpu = {"bins": 64, "warps": 1, "classes": 1, "unit": 8}
    for name, cut in (("bitmap", {}), ("delta", as_for_a_cpu)):
        row = next(row for row in tiny["expected"] if row["sparsity"] == 0.75 and row["format"] == name)
        choice = FORMATS[name].choice(**cut)
        packed = sum(FORMATS[name].pack(weights.matrix(param), choice).nbytes for param in params)
        assert row["targets"]["cpu"]["bytes"] == pytest.approx(packed, rel=0.05), name


def test_mtp_and_vision_are_read_by_their_own_names(tmp_path):
    checkpoint = whole_folder(tmp_path)
    by_name = {tensor.name: tensor for tensor in checkpoint.stored()}
    assert by_name["mtp.fc.weight"].part == "MTP" and by_name["model.visual.pos_embed.weight"].part == "vision"
    assert set(checkpoint.names()).isdisjoint(by_name)  # text only, and short, as ever
    fc = by_name["mtp.fc.weight"]
    assert torch.equal(checkpoint.stored_rows(fc, 3, 9), torch.arange(128.0).view(16, 8)[3:9].bfloat16())
    report = measure(checkpoint, "whole", ASKED)
    assert report["components"]["MTP fc"]["weights"] == 128
    assert report["components"]["vision"]["tensors"] == 1
    assert report["components"]["norms and positions"]["tensors"] == 28


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"mtp.fc.weight": torch.full((4, 4), float("nan"))}, "tensor mtp.fc.weight holds NaN"),
        (
            {"model.visual.merger.norm.weight": torch.tensor([1, -torch.inf])},
            "merger.norm.weight holds NaN or infinity",
        ),
        ({"mtp.fc.weight": torch.ones(4, 4, dtype=torch.int8)}, "tensor mtp.fc.weight is I8"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(tmp_path, extra, message):
    with pytest.raises(Refusal, match=message):
        measure(whole_folder(tmp_path, extra), "bad", ASKED)


def test_outputs_of_layers_are_compared_token_by_token():
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    text = (EXAMPLES / "heldout.txt").read_text()
    found = output_similarity(TINY, text, 40)
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text, add_special_tokens=False).ids[:40]
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states  # the last one is normalised
    cosine = torch.cosine_similarity
    assert found["hidden"]["cosine"][0][4] == pytest.approx(float(cosine(states[1], states[5], -1).mean()), abs=1e-4)
    added = cosine(states[2] - states[1], states[4] - states[3], -1).mean()
    assert found["added"]["cosine"][1][3] == pytest.approx(float(added), abs=1e-4)


def test_the_command(tmp_path, capsys):
    sparse = EXAMPLES / "tiny-qwen3.5-sparse75"
    assert run_command(main, ["--model", str(sparse), "--out", str(tmp_path), "--sparsities", "0.5,0.8"]) == 0
    shown = capsys.readouterr().out
    assert "in all" in shown and "from normal" in shown and "80 %: up to" in shown
    report = json.loads((tmp_path / "measure.json").read_text())
    down = report["by_name"]["down_proj"]
    assert down["zeros"] / down["weights"] == pytest.approx(0.75, abs=1e-4)
    assert down["at"][0]["error"] == 0  # half of the weights are there to drop for nothing
    page = (tmp_path / "measure.html").read_text()
    assert page.count("<svg") > 30 and "down_proj" in page
    assert not [mark for mark in ("<script", "src=", "href=", "url(", "@import", "NaN") if mark in page]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--model"),
        (("--model", "nothing-here"), "unknown model nothing-here"),
        (("--model", str(TINY), "--sparsities", "0.5,1"), "--sparsities: 1 is not between 0 and 1"),
        (("--model", str(TINY), "--thresholds", "small"), "--thresholds 'small' is not a comma list"),
        (("--model", str(TINY), "--thresholds", "nan"), "--thresholds: nan is not between"),
        (("--model", str(TINY), "--text", "/no/such/file"), "cannot read --text /no/such/file"),
        (("--model", str(TINY), "--text", __file__, "--max-tokens", "0"), "--max-tokens 0 must be at least 1"),
        (("--model", str(TINY), "--weights", "synthetic", "--text", __file__), "synthetic weights say nothing"),
        (("--model", str(TINY), "--out", __file__), "is a file: give --out a folder"),
    ],
)
def test_bad_input_hears_one_line(arguments, message, capsys):
    assert run_command(main, arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def whole_folder(folder, extra=None):
    """examples/tiny-qwen3.5 under its published names, with an MTP projection and two vision tensors."""
    source = open_checkpoint(str(TINY))
    tensors = {
        name if name == "lm_head.weight" else f"model.language_model.{name}": source.tensor(name)
        for name in source.names()
    }
    del tensors["lm_head.weight"], tensors["model.language_model.norm.weight"]
    tensors["model.lm_head.weight"] = source.tensor("lm_head.weight")
    tensors["model.norm.weight"] = source.tensor("norm.weight")
    tensors |= {
        "mtp.fc.weight": torch.arange(128.0).view(16, 8).bfloat16(),
        "model.visual.pos_embed.weight": torch.ones(4, 8, dtype=torch.float16),
        "model.visual.blocks.0.attn.qkv.bias": torch.ones(24),
    }
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text((TINY / "config.json").read_text())
    return open_checkpoint(str(folder))
