"""One rank of a large job, alone: the shapes and the tokens it would have."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pithtrain import cli
from pithtrain.config import BalanceConfig, Config, MeshConfig, Qwen3MoeConfig, RunConfig, TrainConfig, UserError
from pithtrain.models.build import build
from pithtrain.rehearse import rehearse

CONFIG = Config(
    run=RunConfig(device="cpu"),
    model=Qwen3MoeConfig(
        vocab_size=512, hidden=64, heads=4, head_dim=16, expert_hidden=64, layers=6, tie_embeddings=False
    ),
    balance=BalanceConfig(global_batch=0.01, sequence=0.01, bias_rate=0.001),
    train=TrainConfig(sequence_length=64, batch_size=256, micro_batch_size=1),
)


def on(batch=256, **mesh):
    train = dataclasses.replace(CONFIG.train, batch_size=batch)
    return dataclasses.replace(CONFIG, mesh=MeshConfig(**mesh), train=train)


def test_all_ranks_together_hold_the_model():
    total = sum(p.numel() for p in build(CONFIG.model).parameters())
    held = [rehearse(on(16, pp=2, ep=2), rank, 8, steps=1) for rank in range(8)]
    assert sum(r.parameters for r in held) == total
    assert [tuple(r.place.values()) for r in held][5] == (1, 0, 0, 1)


@pytest.mark.parametrize("rank", [0, 37, 255])
def test_any_rank_of_256(rank):
    config = on(pp=2, cp=2, ep=4)
    found = rehearse(config, rank, 256, steps=2)
    assert found.place == {"pp": rank // 128, "dp": rank // 8 % 16, "cp": rank // 4 % 2, "ep": rank % 4}
    assert found.imbalance < 2 and found.step_seconds > 0 and found.tokens_per_step == 256 * 64


@pytest.mark.parametrize("rank", [0, 15])
@pytest.mark.parametrize("schedule", ["dualpipev", "zbv", "1f1b"])
def test_a_pipeline_rank_with_and_without_layers(rank, schedule):
    """Two layers on the four stages of two ranks: rank 0 of a V has embedding and head, and no layer."""
    config = on(32, pp=2, ep=4, schedule=schedule)
    config = dataclasses.replace(config, model=dataclasses.replace(CONFIG.model, layers=2))
    found = rehearse(config, rank, 16, steps=2)
    assert found.place["pp"] == rank // 8 and found.step_seconds > 0
    assert (found.imbalance is None) == (rank == 0 and schedule != "1f1b")


@pytest.mark.parametrize("mesh", [{"ep": 4}, {"ep": 4, "pp": 2}, {"ep": 2, "cp": 2}])
def test_arrivals_are_as_many_as_departures(monkeypatch, mesh):
    """The experts of a rank get the tokens that evenly spread peers would send: top_k pairs for each token routed."""
    from pithtrain.layers.experts import Experts

    seen = []
    forward = Experts.forward

    def counted(self, tokens, expert_ids, weights):
        seen.append(int((expert_ids >= 0).sum()))
        return forward(self, tokens, expert_ids, weights)

    monkeypatch.setattr(Experts, "forward", counted)
    rehearse(on(32, **mesh), 2, 16, steps=1)
    pairs = 64 // mesh.get("cp", 1) * CONFIG.model.top_k  # of one microbatch
    assert set(seen) == {pairs}


def test_the_command_reports_memory_and_time(tmp_path):
    (tmp_path / "small.toml").write_text(
        "[model]\nlayers = 2\nhidden = 64\n[train]\nbatch_size = 64\nmicro_batch_size = 1\n"
    )
    arguments = ["rehearse", f"{tmp_path}/small.toml", "--rank", "5", "--mesh.ep", "4", "--mesh.dp", "4"]
    arguments += ["--run.device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "pithtrain.cli", *arguments, "--json", f"{tmp_path}/r.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "rank 5 of 16 (pp 0, dp 1, cp 0, ep 1) on cpu" in run.stdout and "GiB, the whole process" in run.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["peak_bytes"] > 100e6 and result["step_seconds"] > 0


def test_refusals():
    with pytest.raises(UserError, match="--rank: 16 is not one of 16 ranks"):
        rehearse(on(ep=4), 16, 16)
    for mesh, ranks, said in (
        ({"ep": 3}, 16, r"mesh\.ep: 3 does not divide 16"),
        ({"pp": 16, "schedule": "1f1b"}, 16, r"mesh\.pp: 6 layers cannot give 16 stages work; lower mesh\.pp"),
        ({"pp": 2, "ep": 4}, 256, r"mesh\.pp: dualpipev on 2 ranks .* not 2; raise train\.batch_size"),
    ):
        with pytest.raises(UserError, match=said):
            rehearse(on(**mesh), 0, ranks)


def test_the_number_of_ranks_is_that_of_the_mesh_or_asked_for(tmp_path, capsys):
    (tmp_path / "small.toml").write_text("")
    assert cli.main(["rehearse", f"{tmp_path}/small.toml", "--rank", "37"]) == 2
    assert capsys.readouterr().err == (
        "pithtrain: --ranks: not given, and mesh.dp is 0, to be inferred from it; give one of the two\n"
    )
    mesh = ["--mesh.dp", "8", "--mesh.ep", "4"]
    assert cli.main(["rehearse", f"{tmp_path}/small.toml", "--rank", "37", *mesh]) == 2
    assert "--rank: 37 is not one of 32 ranks" in capsys.readouterr().err
