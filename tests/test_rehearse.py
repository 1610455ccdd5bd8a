"""One rank of a large job, alone: the shapes and the tokens it would have."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pithtrain.config import BalanceConfig, Config, MeshConfig, Qwen3MoeConfig, RunConfig, TrainConfig, UserError
from pithtrain.models.build import build
from pithtrain.rehearse import rehearse

CONFIG = Config(
    run=RunConfig(device="cpu"),
    model=Qwen3MoeConfig(
        vocab_size=512, hidden=64, heads=4, head_dim=16, expert_hidden=64, layers=6, tie_embeddings=False
    ),
    balance=BalanceConfig(global_batch=0.01, sequence=0.01),
    train=TrainConfig(sequence_length=64, batch_size=256, micro_batch_size=1),
)


def on(**mesh):
    return dataclasses.replace(CONFIG, mesh=MeshConfig(**mesh))


def test_all_ranks_together_hold_the_model():
    total = sum(p.numel() for p in build(CONFIG.model).parameters())
    held = [rehearse(on(pp=2, ep=2), rank, 8, steps=1) for rank in range(8)]
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
    config = on(pp=2, ep=4, schedule=schedule)
    config = dataclasses.replace(config, model=dataclasses.replace(CONFIG.model, layers=2))
    found = rehearse(config, rank, 16, steps=2)
    assert found.place["pp"] == rank // 8 and found.step_seconds > 0
    assert (found.imbalance is None) == (rank == 0 and schedule != "1f1b")


def test_arrivals_are_as_many_as_departures(monkeypatch):
    """The experts of a rank get the tokens that evenly spread peers would send: top_k pairs for each token routed."""
    from pithtrain.layers.experts import Experts

    seen = []
    forward = Experts.forward

    def counted(self, tokens, expert_ids, weights):
        seen.append(int((expert_ids >= 0).sum()))
        return forward(self, tokens, expert_ids, weights)

    monkeypatch.setattr(Experts, "forward", counted)
    rehearse(on(ep=4), 2, 16, steps=1)
    pairs = 64 * CONFIG.model.top_k  # of one microbatch
    assert seen and all(0.6 * pairs < n < 1.6 * pairs for n in seen), seen


def test_the_command_reports_memory_and_time(tmp_path):
    (tmp_path / "small.toml").write_text(
        "[model]\nlayers = 2\nhidden = 64\n[train]\nbatch_size = 64\nmicro_batch_size = 1\n"
    )
    arguments = [
        "rehearse",
        f"{tmp_path}/small.toml",
        "--ranks",
        "16",
        "--rank",
        "5",
        "--mesh.ep",
        "4",
        "--run.device",
        "cpu",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pithtrain.cli", *arguments, "--json", f"{tmp_path}/r.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "rank 5 of 16 (pp 0, dp 1, cp 0, ep 1) on cpu" in run.stdout and "peak memory" in run.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["peak_bytes"] > 100e6 and result["step_seconds"] > 0


def test_refusals():
    with pytest.raises(UserError, match="--rank: 16 is not one of 16 ranks"):
        rehearse(on(ep=4), 16, 16)
    with pytest.raises(UserError, match=r"mesh\.ep: 3 does not divide 16"):
        rehearse(on(ep=3), 0, 16)
