"""The benchmark measures what it says, on the CPU."""

import json
import sys

import pytest
import torch

from pithtrain.bench import SHAPES, bench_moe, entrants, make_problem, shape_for, shape_named, skewed_ids, table
from pithtrain.bench_step import bench_step, by_kind, describe_bench_step
from pithtrain.cli import main
from pithtrain.config import UserError, config_from_tables

TINY = shape_named("tiny")._replace(tokens=64)
LIMIT = {"torchtitan": 2e-2}  # computes in bfloat16 everywhere


def test_result_is_json_and_names_what_was_measured(capsys):
    result = bench_moe(TINY, torch.device("cpu"), repeats=1)
    assert json.loads(json.dumps(result)) == result
    assert "CPU" in result["measured"] and result["shape"]["tokens"] == 64
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["floor: grouped products alone"]["ratio_to_floor"] == 1
    assert all(row["ms"] > 0 for row in rows.values())
    assert all(rows[name]["difference"] < LIMIT.get(name, 1e-5) for name in entrants())
    assert table(result) in capsys.readouterr().out


def test_all_entrants_have_the_same_gradients():
    problem, found = make_problem(TINY, torch.device("cpu")), {}
    leaves = {"tokens": problem.tokens, "router": problem.router, "down": problem.down}  # others may copy gate_up
    for name, build in entrants().items():
        block = build(problem)
        block(problem.tokens).backward(problem.grad)
        found[name] = {leaf: tensor.grad for leaf, tensor in leaves.items()}
        for tensor in (*leaves.values(), problem.gate_up):
            tensor.grad = None
    for name, grads in found.items():
        for leaf, grad in grads.items():
            true = found["torch"][leaf]
            assert (grad - true).norm() <= LIMIT.get(name, 1e-5) * true.norm(), (name, leaf)


def test_a_full_size_shape_is_cut_down_on_a_cpu():
    for shape in SHAPES:
        cut, said = shape_for(shape, torch.device("cpu"))
        assert cut.hidden <= 512 and cut.tokens <= 512 and "no GPU here" in said


def test_unknown_shape_is_one_line_with_the_known_ones():
    with pytest.raises(UserError, match=r"no shape is named 'qwen9'; known: qwen3-30b-a3b"):
        shape_named("qwen9")


def test_help_lists_the_shapes(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "moe", "--help"])
    told = "".join(capsys.readouterr().out.split())
    assert all(shape.name in told for shape in SHAPES)


@pytest.mark.parametrize("experts, top_k", [(64, 2), (32, 4)])
def test_skewed_load_is_what_it_claims(experts, top_k):
    ids = skewed_ids(TINY._replace(tokens=4096, experts=experts, top_k=top_k), torch.device("cpu"))
    counts = torch.bincount(ids.flatten(), minlength=experts).float()
    assert 7.5 < (counts.max() / counts.mean()).item() < 8.5
    assert all(len(set(row)) == top_k for row in ids[:50].tolist())


def test_a_peer_of_another_release_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "torchtitan").mkdir()
    (tmp_path / "torchtitan/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchtitan"]:
        monkeypatch.delitem(sys.modules, name)
    assert "torchtitan" not in entrants()
    monkeypatch.delitem(sys.modules, "torchtitan")


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek", "gpt-oss", "qwen3.5-moe"])
def test_every_family_takes_its_step_beside_transformers(family):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = {"family": family, "vocab_size": 300, "layers": 2, "hidden": 32, "experts": 4, "expert_hidden": 16}
    train = {"sequence_length": 16, "batch_size": 2, "micro_batch_size": 1}
    tables = {"run": {"device": "cpu"}, "model": {**model, "top_k": 2}, "train": train}
    result = bench_step(config_from_tables(tables, "bench"), rounds=1)
    losses = result["first_loss"].values()
    assert len(losses) == 3 and max(losses) - min(losses) < 0.1 and abs(max(losses) - 5.7) < 0.3  # log(300)
    assert sum(result["profiles"]["pithtrain"]["kinds"].values()) > 0
    assert "pithtrain is" in describe_bench_step(result)


def test_copies_on_the_device_are_copies():
    kinds = by_kind({"Memcpy DtoD (Device -> Device)": 2.0, "aten::copy_": 1.0, "void nvjet_tst": 4.0, "other": 8.0})
    assert (kinds["copies and casts"], kinds["matrix products"], kinds["everything else"]) == (3.0, 4.0, 8.0)
