"""Every family on every small mesh against one process: losses, gradient norms, weights after three steps."""

import dataclasses
import math
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist

from pithtrain import cli
from pithtrain import config as settings
from pithtrain.config import (
    BalanceConfig,
    Config,
    DeepseekConfig,
    GptOssConfig,
    MeshConfig,
    OptimizerConfig,
    Qwen3_5MoeConfig,
    Qwen3MoeConfig,
    TrainConfig,
    UserError,
)
from pithtrain.parallel.mesh import Mesh, fit_axes
from pithtrain.parallel.pipeline.generate import KINDS, generate
from pithtrain.parallel.pipeline.lower import lower
from pithtrain.parallel.pipeline.overlap import overlapped
from pithtrain.parallel.pipeline.schedule import Op
from pithtrain.train.step import Learner, read_microbatches
from pithtrain.verify import RandomBatches, Trace, compare, reference_config, trace, verify

pytestmark = pytest.mark.timeout(1500)  # a matrix takes minutes on two busy cores

TOLERANCE = 1e-5
SIZES = {
    "vocab_size": 300,
    "layers": 4,
    "hidden": 32,
    "heads": 4,
    "experts": 8,
    "top_k": 3,
    "expert_hidden": 24,
    "tie_embeddings": False,
    "init_std": 0.1,
}
FAMILIES = {
    "qwen3-moe": Qwen3MoeConfig(**SIZES, kv_heads=2, head_dim=8),
    "deepseek v2": DeepseekConfig(**SIZES, head_dim=8, rope_dim=4, value_dim=6, latent_rank=12, dense_hidden=40),
    "deepseek v3": DeepseekConfig(
        **SIZES, scoring="sigmoid", head_dim=8, rope_dim=4, value_dim=8, latent_rank=12, query_rank=16,
        dense_hidden=40, groups=4, top_groups=2, renormalise=True, routed_scale=2.5,
    ),
    "gpt-oss": GptOssConfig(**SIZES, kv_heads=2, head_dim=8, window=5),
    "qwen3.5-moe": Qwen3_5MoeConfig(
        **{**SIZES, "init_std": 0.05}, kv_heads=2, head_dim=8, rope_dim=4, full_every=2, delta_key_heads=4,
        delta_value_heads=8, delta_key_dim=8, delta_value_dim=6, shared_hidden=20,
    ),
}  # fmt: skip
TRAIN = TrainConfig(steps=20, sequence_length=32, batch_size=8, micro_batch_size=1)
BALANCE = BalanceConfig(global_batch=0.01, sequence=0.02, bias_rate=0.001)
MESHES = {
    2: [{"dp": 2}, {"cp": 2}, {"ep": 2}, {"pp": 2}],
    4: [{"dp": 4}, {"cp": 4}, {"ep": 4}, {"dp": 2, "cp": 2}, {"dp": 2, "ep": 2}, {"cp": 2, "ep": 2}],
    8: [{"dp": 2, "cp": 2, "ep": 2}],
}


# Adam makes a whole step of a gradient that is nothing but rounding, unless eps is larger than that.
OPTIMIZER = OptimizerConfig(eps=1e-5)


def run(model, mesh, **changes):
    train = dataclasses.replace(TRAIN, **changes.pop("train", {}))
    return Config(
        model=model, mesh=MeshConfig(**mesh), train=train, **{"balance": BALANCE, "optimizer": OPTIMIZER, **changes}
    )


def check(configs, world_size, prepare=None):
    found = verify(configs, world_size, prepare=prepare)
    for config, c in zip(configs, found, strict=True):
        mesh = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config.mesh).items() if v not in (0, 1))
        print(f"{config.model.family:<12} {mesh:<28} {c.largest:.1e} {c.name}")  # seen with pytest -rP
    for config, c in zip(configs, found, strict=True):
        assert c.largest < TOLERANCE and c.load == 0, (config.model.family, config.mesh, c)
    return found


def test_no_family_is_left_out():
    assert {type(model) for model in FAMILIES.values()} == set(settings.FAMILIES)


@pytest.mark.parametrize("world_size", MESHES)
def test_every_family_on_every_mesh(world_size):
    families = FAMILIES.values()
    configs = [run(model, mesh) for model in families for mesh in MESHES[world_size]]
    check(configs, world_size)


def test_pipelines_beside_the_other_axes():
    qwen, deepseek = FAMILIES["qwen3-moe"], FAMILIES["deepseek v3"]
    check([run(m, {"pp": 2, axis: 2}) for m, axis in ((qwen, "cp"), (qwen, "ep"), (qwen, "dp"), (deepseek, "ep"))], 4)
    check([run(qwen, {"pp": 2, "cp": 2, "ep": 2}), run(qwen, {"dp": 2, "ep": 4}), run(qwen, {"cp": 4, "ep": 2})], 8)


def to_first_experts(learner):
    """All tokens choose experts 0, 1 and 2, in each of the steps: ranks of the upper half receive nothing."""
    for part in learner.parts.values():
        for layer in part.layers.values():
            if layer.router is not None:
                layer.router.bias[:3] = 100.0

    def step(*given, plain=learner.step):
        result = plain(*given)
        assert (result.load[:, :3] > 0).all() and not result.load[:, 3:].any()
        return result

    learner.step = step


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_that_receives_nothing(family):
    model = FAMILIES[family]
    configs = [run(model, {"ep": 4}), run(model, {"dp": 2, "ep": 2}), run(model, {"pp": 2, "ep": 2})]
    check(configs, 4, to_first_experts)


def in_documents(learner):
    """Both rows of a microbatch hold several documents, which begin and end within the pieces of two ranks."""
    documents = torch.tensor([0, 5, 21, 32, 41, 43, 64], dtype=torch.int32)
    for part in learner.parts.values():
        part.begin = lambda x, positions, _, begin=part.begin: begin(x, positions, documents)


def test_packed_documents_in_pieces():
    configs = [run(model, {"cp": 2}, train={"micro_batch_size": 2}) for model in FAMILIES.values()]
    check(configs, 2, in_documents)
    for config in configs:
        assert compare(one_rank(config, in_documents), one_rank(config)).largest > 1e-3  # documents do something


def test_more_experts_a_token_than_ranks_and_all_of_them():
    models = [dataclasses.replace(FAMILIES["qwen3-moe"], top_k=top_k) for top_k in (5, 8)]
    check([run(model, {"ep": 2}) for model in models], 2)


def test_balance_over_microbatches_and_sequences():
    """The reference then takes the ranks' microbatches one after the other."""
    balance = BalanceConfig(micro_batch=0.03, sequence=0.02, global_batch=0.0)
    check([run(FAMILIES["qwen3-moe"], mesh, balance=balance) for mesh in ({"dp": 2}, {"cp": 2}, {"ep": 2})], 2)


def test_recomputation_and_hybrid_sharding_change_nothing():
    model = FAMILIES["qwen3-moe"]
    configs = [run(model, mesh, train={"recompute": what}) for what in ("attention", "experts", "layer")
               for mesh in ({"dp": 2, "ep": 2}, {"pp": 2, "dp": 2})]  # fmt: skip
    check([*configs, run(model, {"copies": 2}), run(model, {"copies": 2, "cp": 2})], 4)


def overlaps(learner):
    """What a rank of a pipeline runs has overlapped actions in it, which are run overlapped."""
    if learner.mesh.axes.pp > 1:
        assert learner.engine.overlap is overlapped
        assert sum(action.op is Op.OVERLAP for action in learner.engine.schedule.ranks[learner.engine.rank]) > 1


def test_overlap_beside_expert_parallelism_and_recomputation():
    qwen, deepseek, mesh = FAMILIES["qwen3-moe"], FAMILIES["deepseek v2"], {"pp": 2, "ep": 2}
    longer = dataclasses.replace(qwen, layers=8)
    configs = [run(qwen, mesh, train={"recompute": what}) for what in ("none", "attention", "experts", "layer")]
    configs += [run(deepseek, mesh, train={"recompute": "layer"}), run(longer, {"pp": 4})]
    check(configs, 4, overlaps)


def test_every_schedule_with_other_axes_and_recomputation():
    """Each kind with and without recomputation, and with each of both beside expert or beside data parallelism."""
    model, configs = FAMILIES["qwen3-moe"], []
    for (i, kind), (j, what) in product(enumerate(KINDS), enumerate(("none", "layer"))):
        mesh = {"pp": 2, "schedule": kind, ("ep", "dp")[(i + j) % 2]: 2}
        configs.append(run(model, mesh, train={"recompute": what}))
    check(configs, 4)


def test_every_schedule_on_four_ranks():
    longer = dataclasses.replace(FAMILIES["qwen3-moe"], layers=8)
    check([run(longer, {"pp": 4, "schedule": kind}) for kind in KINDS], 4)


def one_stage_at_a_time(learner):
    """No two stages of a rank are gathered at once: they come and go within the step."""
    if learner.mesh.axes.pp > 1:
        passes = generate(learner.config.mesh.schedule, 2, learner.schedule.microbatches)
        learner.engine.schedule = lower(passes, resident=1)
        assert [action.op for action in learner.engine.schedule.ranks[0]].count(Op.RESHARD) > 4


def test_weights_that_come_and_go_within_a_step():
    model = FAMILIES["qwen3-moe"]
    check([run(model, {"pp": 2, "dp": 2, "schedule": kind}) for kind in ("interleaved", "zbv")], 4, one_stage_at_a_time)


def one_rank(config, prepare=None):
    return trace(reference_config(config, 1), Mesh(fit_axes(MeshConfig(), 1)), 3, prepare)


def test_a_comparison_sees_a_small_fault():
    config = run(FAMILIES["qwen3-moe"], {})
    wanted = one_rank(config)
    assert compare(wanted, wanted).largest == 0

    def nudged(learner):
        weight = dict(learner.named_parameters())["layers.2.experts.down"]
        weight.data[3] *= 1.001

    found = one_rank(config, nudged)
    comparison = compare(found, wanted)
    assert comparison.name == "layers.2.experts.down" and comparison.largest > TOLERANCE

    broken = {n: w * float("nan") if "norm" in n else w for n, w in wanted.weights.items()}
    assert math.isnan(compare(Trace(wanted.results, broken), wanted).largest)
    broken = [result._replace(loss=float("nan")) for result in wanted.results]
    assert math.isnan(compare(Trace(broken, wanted.weights), wanted).largest)


def unsummed(learner):
    """The exchange of balance loads is left out: each rank balances what it sees."""
    for objective in learner.objectives.values():
        objective.mesh = dataclasses.replace(objective.mesh, token_group=None, cp_group=None)


def test_a_missing_sum_over_ranks_is_found():
    balance = BalanceConfig(global_batch=0.1)
    (found,) = verify([run(FAMILIES["qwen3-moe"], {"dp": 2}, balance=balance)], 2, prepare=unsummed)
    assert found.largest > TOLERANCE


def local_means(learner):
    """Each rank takes the mean over its own targets, and the ranks' means are meaned."""
    if group := learner.mesh.token_group:
        learner.mesh = dataclasses.replace(learner.mesh, token_group=None)
        for objective in learner.objectives.values():
            objective.begin = lambda own, m, begin=objective.begin: begin(own * group.size(), m)


@pytest.mark.parametrize("axis", ["dp", "cp", "ep"])
def test_a_mean_of_local_means_is_found(axis):
    (found,) = verify([run(FAMILIES["qwen3-moe"], {axis: 2})], 2, prepare=local_means)
    assert found.loss > 1e-4 and found.grad_norm > 1e-3


def test_the_step_is_that_of_a_plain_loop():
    """One process itself, against a loop that knows nothing of engines: torch's loss, clipping and AdamW."""
    from pithtrain.layers.balance import switch_loss
    from pithtrain.layers.router import expert_load

    config = run(FAMILIES["qwen3-moe"], {}, balance=BalanceConfig(global_batch=0.05), train={"micro_batch_size": 8})
    mesh = Mesh(fit_axes(MeshConfig(), 1))
    learner, plain = Learner(config, mesh), Learner(config, mesh).parts[0]
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    rest = [p for p in plain.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=OPTIMIZER.eps,
        weight_decay=0.1,
        lr=2e-3,
    )
    for step in range(3):
        (batch,) = read_microbatches(RandomBatches(300, 32, 8), step, 8, mesh)
        result = learner.step([batch], 2e-3)
        optimizer.zero_grad()
        hidden, routing = plain(batch.inputs, batch.positions)
        loss = torch.nn.functional.cross_entropy(plain.logits(hidden).flatten(0, 1), batch.targets.flatten())
        balance = sum(0.05 * switch_loss(r.probs, expert_load(r.expert_ids.flatten(), 8)) for r in routing)
        (loss + balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.balance == pytest.approx(balance.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert torch.equal(result.load, torch.stack([expert_load(r.expert_ids.flatten(), 8) for r in routing]))
    for (name, ours), theirs in zip(learner.named_parameters(), plain.parameters(), strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_the_step_on_a_gpu_is_the_cpus(family):
    """Kernels and their optimiser in fp32 on a GPU, plain PyTorch on the CPU; each step begins where the CPU's did."""
    config = run(FAMILIES[family], {}, train={"micro_batch_size": 4})
    axes = fit_axes(MeshConfig(), 1)
    cpu, gpu = (Learner(config, Mesh(axes, device=torch.device(device))) for device in ("cpu", "cuda"))
    for step in range(3):
        for name, tensor in gpu.state().items():
            tensor.copy_(cpu.state()[name])
        for learner in (cpu, gpu):
            learner.resume(step)
        results = [x.step(read_microbatches(RandomBatches(300, 32, 8), step, 4, x.mesh), 2e-3) for x in (cpu, gpu)]
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-3)
        assert torch.equal(results[0].load, results[1].load)
    for (name, a), (_, b) in zip(gpu.state().items(), cpu.state().items(), strict=True):
        assert (a.cpu() - b).norm() <= 2e-3 * b.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_nothing_waits_between_the_first_kernel_and_the_result(family, monkeypatch):
    config = run(FAMILIES[family], {}, train={"micro_batch_size": 4})
    learner = Learner(config, Mesh(fit_axes(MeshConfig(), 1), device=torch.device("cuda")), torch.bfloat16)
    batches = [read_microbatches(RandomBatches(300, 32, 8), step, 4, learner.mesh) for step in range(2)]
    learner.step(batches[0], 2e-3)  # compiles
    (objective,) = learner.objectives.values()
    begin, result = objective.begin, learner.result

    def begin_and_watch(*counts):
        begin(*counts)
        torch.cuda.set_sync_debug_mode("error")

    def unwatched_result(norm):
        torch.cuda.set_sync_debug_mode("default")
        return result(norm)

    monkeypatch.setattr(objective, "begin", begin_and_watch)
    monkeypatch.setattr(learner, "result", unwatched_result)
    try:
        learner.step(batches[1], 2e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_microbatches_of_all_ranks_are_the_batch():
    batches = RandomBatches(300, 32, 16)
    whole, _ = batches.read(batches.rows(2))
    seen = torch.zeros_like(whole)
    for rank in range(8):
        mesh = Mesh(fit_axes(MeshConfig(cp=2, ep=2), 8), rank)
        for number, micro in enumerate(read_microbatches(batches, 2, 2, mesh)):
            first = number * 8 + mesh.batch_rank * 2
            seen[first : first + 2, micro.positions] += micro.inputs
    assert torch.equal(seen, whole)


def test_what_cannot_be_verified_is_refused():
    both = run(FAMILIES["qwen3-moe"], {"dp": 2}, balance=BalanceConfig(global_batch=0.1, micro_batch=0.1))
    with pytest.raises(UserError, match=r"balance\.micro_batch"):
        verify([both], 2)
    for family, mesh, ranks, said in (
        ("qwen3-moe", {"ep": 3}, 2, "mesh.ep: 3 does not divide 2"),
        ("qwen3.5-moe", {"cp": 8}, 8, "mesh.cp: 8 does not divide model.delta_key_heads, 4"),
        ("qwen3-moe", {"pp": 8}, 8, "mesh.pp: dualpipev on 8 ranks .* not 8; raise train.batch_size"),
        ("qwen3-moe", {"pp": 8, "schedule": "1f1b"}, 8, "mesh.pp: 4 layers cannot give 8 stages work; lower mesh.pp"),
        ("qwen3-moe", {"dp": 3}, 3, "mesh.dp x mesh.ep: 3 ranks .* train.batch_size, 8"),
    ):
        changes = {"train": {"sequence_length": 64}} if mesh.get("cp") else {}
        with pytest.raises(UserError, match=said):
            verify([run(FAMILIES[family], mesh, **changes)], ranks)
    assert not dist.is_initialized()


TOML = """
[model]
vocab_size = 300
layers = 2
hidden = 32
heads = 4
head_dim = 8
experts = 4
expert_hidden = 16

[train]
sequence_length = 16
batch_size = 4
micro_batch_size = 4
"""


def test_the_command(tmp_path, capsys):
    config = tmp_path / "small.toml"
    config.write_text(TOML)
    assert cli.main(["verify", str(config), "--mesh", "ep=2"]) == 0
    out = capsys.readouterr().out
    assert "PASS" in out and "weights" in out
    assert "optimizer.eps: 1e-06, not 1e-08 (a smaller one turns rounding into steps)" in out
    assert cli.main(["verify", str(config), "--mesh", "ep=2", "--tolerance", "0"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert cli.main(["verify", str(config), "--mesh", " dp=1, ep = 2", "--steps", "1"]) == 0
    assert "2 processes" in capsys.readouterr().out
    assert cli.main(["verify", str(config), "--mesh", "ep=2", "--mesh.ep", "2"]) == 2
    assert "--mesh.ep: is also in --mesh ep=2; give it once" in capsys.readouterr().err
    assert cli.main(["verify", str(config), "--mesh", "ep=2", "--mesh", "ep=4"]) == 2
    assert "'ep=2,ep=4' is not a list" in capsys.readouterr().err
    assert cli.main(["bench", "step", str(config), "--mesh.ep", "2"]) == 2
    assert "bench step measures one process" in capsys.readouterr().err
    for mesh, said in (
        ("ep=3", "mesh.ep: 3 does not divide model.experts, 4"),
        ("eq=2", "--mesh.eq: no such setting; known: pp"),
        ("dp=3", "3 ranks share the batch, and must divide train.batch_size, 4"),
        ("ep=2,ep=4", "--mesh: 'ep=2,ep=4' is not a list of axes and sizes, each axis once"),
        ("ep=2 dp=2", "--mesh.ep: '2 dp=2' is of type str"),
        ("", "--mesh: '' is not a list of axes and sizes"),
        ("dp=1", "--mesh: 'dp=1' is one rank"),
        ("pp=8", "mesh.pp: dualpipev on 8 ranks needs"),
        ("pp=5,schedule=1f1b", "mesh.pp: 2 layers cannot give 5 stages work"),
    ):
        assert cli.main(["verify", str(config), "--mesh", mesh]) == 2
        out, err = capsys.readouterr()
        assert said in err and len(err.splitlines()) == 1 and "steps on" not in out, err


def test_the_command_keeps_what_the_config_says_of_the_mesh(tmp_path, capsys):
    config = tmp_path / "small.toml"
    config.write_text(TOML + "[mesh]\npp = 2\n")
    few = ["verify", str(config), "--mesh", "ep=1", "--train.batch_size", "2", "--train.micro_batch_size", "1"]
    assert cli.main([*few, "--mesh.schedule", "gpipe"]) == 0  # DualPipeV refuses two microbatches
    assert "on 2 processes (pp=2,schedule=gpipe)" in capsys.readouterr().out


@pytest.mark.gpu
def test_gpu_beside_a_gpu_the_cpu_is_verified(tmp_path, capsys):
    config = tmp_path / "small.toml"
    config.write_text(TOML)
    assert cli.main(["verify", str(config), "--mesh", "ep=2"]) == 0
    assert "PASS" in capsys.readouterr().out


def test_rows_do_not_depend_on_the_batch():
    batches = RandomBatches(300, 8, 4)
    rows = batches.rows(3)
    assert all(b == a + 1 for a, b in pairwise(rows))
    together, apart = batches.read(rows)[0], [batches.read(rows[i : i + 1])[0][0] for i in range(4)]
    assert torch.equal(together, torch.stack(apart))
