"""Held-out loss, multiple choice and the harness's three questions, each against the sum written out."""

import contextlib
import io
import json
import math
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import families
import pytest
import test_deepseek
import test_gpt_oss
import test_qwen3_5_moe
import test_qwen3_moe
import torch

from pithtrain.cli import main
from pithtrain.config import Config, DataConfig, Qwen3MoeConfig, RunConfig, TrainConfig, UserError
from pithtrain.evaluate import (
    Question,
    choose,
    encode_pair,
    evaluate,
    likelihoods,
    read_questions,
    use_accelerator,
    validate,
)
from pithtrain.harness import HarnessModel
from pithtrain.hub import export_model, import_model
from pithtrain.train.generate import generate
from pithtrain.train.run import Run, open_run
from pithtrain.train.tokenizer import save_tokenizer, train_tokenizer
from pithtrain.train.trainer import train

FAMILIES = {
    "qwen3-moe": test_qwen3_moe.BASE,
    "deepseek-v3": test_deepseek.SHAPES["V3"][0],
    "gpt-oss": test_gpt_oss.BASE,
    "qwen3.5-moe": test_qwen3_5_moe.BASE,
}
TEXTS = ["the cat sat on the mat\n", "the dog ran to the park\n", "naïve café\n"] * 100


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def alone(model, before, after, context):
    """The log-likelihood of one continuation, a row of its own, the sum written out; and whether it is greedy."""
    row = (before + after)[-context - 1 :]
    with torch.no_grad():
        hidden, _ = model(torch.tensor([row[:-1]]), torch.arange(len(row) - 1))
    logs = model.logits(hidden)[0].double().log_softmax(-1)
    places = range(len(row) - 1 - len(after), len(row) - 1)
    return (
        sum(logs[p, row[p + 1]].item() for p in places),
        all(logs[p].argmax().item() == row[p + 1] for p in places),
    )


@pytest.fixture(scope="module")
def small_run():
    """An untrained model with a tokenizer, as an opened run."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=270)
    config = Config(
        run=RunConfig(device="cpu"),
        model=Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=270, layers=2),
        train=TrainConfig(sequence_length=16),
    )
    return Run(config, tokenizer, families.random_model(config.model), 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of a few steps."""
    here = tmp_path_factory.mktemp("evaluate")
    (here / "text").mkdir()
    for number in range(30):
        (here / "text" / f"{number}.txt").write_text("".join(TEXTS[number % 3 : number % 3 + 12]))
    config = Config(
        run=RunConfig(name="run", folder=str(here), device="cpu"),
        data=DataConfig(corpus=str(here / "text"), pattern="*.txt", folder=str(here / "data"), held_out=0.2),
        model=Qwen3MoeConfig(hidden=32, heads=4, head_dim=8, experts=4, expert_hidden=16, vocab_size=270, layers=1),
        train=TrainConfig(steps=21, sequence_length=24, batch_size=4, micro_batch_size=4),
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config)
    return config.path


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("name", FAMILIES)
def test_likelihoods_do_not_depend_on_the_batch(name, batch):
    model, generator = families.random_model(FAMILIES[name]), torch.Generator().manual_seed(1)

    def some(low, high):
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(300, (count,), generator=generator).tolist()

    requests = [(some(1, 15), some(1, 12)) for _ in range(12)]
    requests += [([5], [6]), (some(30, 31), some(12, 13)), (some(11, 12), some(1, 2))]
    greedy = [int(model.logits(model(torch.tensor([before]), torch.arange(len(before)))[0])[0, -1].argmax())
              for before, _ in requests[:3]]  # fmt: skip
    requests += [(before, [token]) for (before, _), token in zip(requests, greedy, strict=False)]
    found = likelihoods(model, requests, context=12, batch=batch)
    for (before, after), one in zip(requests, found, strict=True):
        log, is_greedy = alone(model, before, after, 12)
        assert one.log == pytest.approx(log, abs=2e-4, rel=1e-5) and one.greedy == is_greedy
    assert any(one.greedy for one in found) and not all(one.greedy for one in found)


@pytest.mark.parametrize("before, after", [([], [1]), ([1], []), ([1], [1] * 13)])
def test_likelihoods_of_nothing_are_refused(before, after):
    with pytest.raises(ValueError, match="need one at least"):
        likelihoods(families.random_model(FAMILIES["qwen3-moe"]), [([1], [2]), (before, after)], context=12)


def test_a_long_continuation_is_scored_in_parts():
    model = families.random_model(FAMILIES["qwen3-moe"])
    after = torch.randint(300, (1100,), generator=torch.Generator().manual_seed(0)).tolist()
    (found,) = likelihoods(model, [([3], after)], context=2000)
    assert found.log == pytest.approx(alone(model, [3], after, 2000)[0], rel=1e-5)


def test_validation_is_that_of_the_trainer(trained):
    told = json.loads((trained / "results.json").read_text())
    found = validate(open_run(trained), trained)
    assert found["loss"] == pytest.approx(told["nats_per_token"]["this model"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(told["bits_per_byte"]["this model"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_the_command_prints_and_writes_both(trained, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"context": "the cat", "choices": [" sat", " xyz"], "answer": 0}\n')
    assert main(["evaluate", str(trained), "--choices", str(questions), "--json", str(tmp_path / "out.json")]) == 0
    found, said = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert found["held-out text"] == validate(open_run(trained), trained)
    assert found["choices"]["questions"] == 1 and "held-out text: loss " in said and "choices: questions 1" in said
    assert said.startswith("predicting ")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err


def test_without_shards_questions_are_still_answered(trained, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    text = (moved / "config.toml").read_text()
    (moved / "config.toml").write_text(text.replace(str(trained.parent / "data"), str(tmp_path / "none")))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"context": "the cat", "choices": [" sat", " xyz"], "answer": 0}\n')
    assert evaluate(moved, questions).keys() == {"choices"}
    assert not (tmp_path / "none").exists()


def test_an_imported_model_gets_its_loss_on_any_text_without_training(trained, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path / "out")]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    config = (tmp_path / "back" / "config.toml").read_bytes()
    data = {"corpus": trained.parent / "text", "pattern": "*.txt", "folder": tmp_path / "data", "held_out": "0.2"}
    given = [f"--data.{key}={value}" for key, value in data.items()]
    assert main(["evaluate", str(tmp_path / "back"), *given, "--json", str(tmp_path / "out.json")]) == 0
    found, expected = json.loads((tmp_path / "out.json").read_text()), validate(open_run(trained), trained)
    assert found["held-out text"] == pytest.approx(expected, rel=1e-6)
    assert (tmp_path / "data/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    assert (tmp_path / "back" / "config.toml").read_bytes() == config
    assert main(["evaluate", str(trained), *given[:3], "--data.held_out=0.1"]) == 2  # shards of something else
    assert "choose another data.folder" in capsys.readouterr().err
    assert main(["evaluate", str(trained), *given, "--train.sequence_length=8"]) == 2
    assert "--train.sequence_length: unexpected" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_imported_bf16_model_keeps_its_matrices_so_and_computes_the_same(name, device, tmp_path):
    families.make_run(replace(FAMILIES[name], vocab_size=270), tmp_path / "run")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=270), tmp_path / "run" / "tokenizer.json")
    export_model(tmp_path / "run", tmp_path / "out", "BF16", report=str)
    import_model(tmp_path / "out", tmp_path / "back", report=str)
    config, types = tmp_path / "back" / "config.toml", tmp_path / "back" / "published" / "dtypes.json"
    config.write_text(config.read_text().replace('precision = "auto"', 'precision = "bfloat16"'))
    half = use_accelerator(open_run(tmp_path / "back"))
    types.write_text(types.read_text().replace("BF16", "F32"))
    whole = use_accelerator(open_run(tmp_path / "back"))
    for run, kind in ((half, torch.bfloat16), (whole, torch.float32)):
        assert {(p.dim() > 1, p.dtype) for p in run.model.parameters()} == {(True, kind), (False, torch.float32)}
    assert next(half.model.parameters()).device.type == device
    ids, positions = families.text(half.config.model, 2, 16)[0].to(device), torch.arange(16, device=device)
    with torch.no_grad():
        a, b = (run.model.logits(run.model(ids, positions)[0]) for run in (half, whole))
    assert torch.equal(a, b)
    assert generate(half, "the cat", 12, seed=1) == generate(whole, "the cat", 12, seed=1)


def test_a_pair_is_encoded_as_its_text_is(small_run):
    tokenizer, run = small_run.tokenizer, small_run
    for context, continuation in (
        ("the cat", " sat"),
        ("the cat ", "sat"),
        ("the c", "at sat"),
        ("", "the cat"),
        ("the", ""),
        ("naïve", " café"),
        ("  ", "x"),
    ):
        before, after = encode_pair(run, context, continuation)
        whole = tokenizer.encode(context + continuation).ids
        assert before + after == run.opened(whole)
        assert len(after) >= (1 if whole else 0) and len(before) >= 1
    before, after = encode_pair(run, "the cat ", "sat on")
    assert (before, after) == encode_pair(run, "the cat", " sat on")
    assert tokenizer.decode(after) == " sat on"


def test_the_likeliest_choice_counts_in_all_and_per_byte(small_run):
    texts = [" sat", " sat on the mat", " ran to", " x"]
    questions = [Question(context, texts, answer) for context in ("the cat", "the dog", "") for answer in range(4)]
    found = choose(small_run, questions, batch=5)
    right = [0, 0]
    for question in questions:
        pairs = [encode_pair(small_run, question.context, text) for text in texts]
        logs = [alone(small_run.model, *pair, 16)[0] for pair in pairs]
        for kind, values in enumerate((logs, [log / len(text) for log, text in zip(logs, texts, strict=True)])):
            right[kind] += max(range(4), key=values.__getitem__) == question.answer
    assert found == {"questions": 12, "accuracy": right[0] / 12, "accuracy_per_byte": right[1] / 12, "cut": 0}
    assert found["accuracy"] == 0.25  # each question has each answer once
    per_byte = [Question("the cat", ["é" * 4, "e" * 4], 0)]  # four characters each, eight bytes and four
    (one, two) = (alone(small_run.model, *encode_pair(small_run, "the cat", t), 16)[0] for t in ("éééé", "eeee"))
    assert choose(small_run, per_byte)["accuracy_per_byte"] == (one / 8 > two / 4)


def test_a_choice_beyond_the_context_is_refused(small_run):
    with pytest.raises(UserError, match="longer than the model's context, 16"):
        choose(small_run, [Question("the", ["x", "y" * 60], 0)])


def test_a_context_that_loses_its_start_is_told(small_run):
    questions = [Question("the cat sat " * 9, ["x", "y"], 0), Question("the", ["x", "y"], 0)]
    assert choose(small_run, questions)["cut"] == 2
    harness = HarnessModel(small_run)
    with pytest.warns(UserWarning, match="1 texts lose their start: longer than the context, 16"):
        harness.loglikelihood([ask("the cat sat " * 9, "x"), ask("the", "x")])
    with pytest.warns(UserWarning, match="a prompt loses its start"):
        harness.write("the cat sat " * 9, {"max_gen_toks": 1})
    long = small_run._replace(published={"max_position_embeddings": 100})
    assert choose(long, questions)["cut"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = encode_pair(long, "the cat sat " * 9, "x")
        (log, _), _ = HarnessModel(long).loglikelihood([ask("the cat sat " * 9, "x"), ask("the", "x")])
    assert log == pytest.approx(alone(long.model, *pair, 100)[0], abs=2e-4)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"context": "a", "choices": ["b", "c"]}',
        '{"context": "a", "choices": ["b", "c"], "answer": 2}',
        '{"context": "a", "choices": ["b", "c"], "answer": true}',
        '{"context": "a", "choices": ["b", ""], "answer": 0}',
        '{"context": "a", "choices": [], "answer": 0}',
        '{"context": 1, "choices": ["b"], "answer": 0}',
        '{"context": "a", "choices": "bc", "answer": 0}',
    ],
)
def test_lines_that_are_no_questions_are_named(line, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}: line 2: expected") and "\n" not in str(caught.value)


def test_other_ends_of_lines_may_stand_in_a_text(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"context": "a\u2028b", "choices": ["\x85"], "answer": 0}\r\n\n', encoding="utf-8"
    )
    (question,) = read_questions(tmp_path / "q.jsonl")
    assert question.context == "a\u2028b" and question.choices == ["\x85"]


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")


def ask(*arguments):
    return SimpleNamespace(args=arguments)


def test_the_harness_gets_likelihoods_of_continuations(small_run):
    requests = [ask("the cat", " sat on"), ask("", "the dog"), ask("the", " dog")]
    found = HarnessModel(small_run, batch=2).loglikelihood(requests)
    for request, (log, greedy) in zip(requests, found, strict=True):
        pair = encode_pair(small_run, *request.args)
        assert (log, greedy) == (pytest.approx(alone(small_run.model, *pair, 16)[0], abs=2e-4), False)


def test_the_harness_gets_the_likelihood_of_whole_texts_each_token_once(small_run):
    texts = ["the cat sat", "the dog ran to the park " * 9, "", "x" * 16, "x" * 17]
    found = HarnessModel(small_run).loglikelihood_rolling([ask(text) for text in texts])
    for text, log in zip(texts, found, strict=True):
        ids = small_run.opened(small_run.tokenizer.encode(text).ids)
        total = 0.0
        for start in range(1, len(ids), 16):
            after = ids[start : start + 16]
            before = ids[max(0, start - 1 - (16 - len(after))) : start]  # no more than 16 are read
            total += alone(small_run.model, before, after, 16)[0]
        assert log == pytest.approx(total, abs=5e-4)
    assert found[2] == 0


def test_the_harness_gets_what_the_model_writes(small_run):
    harness = HarnessModel(small_run)
    greedy = generate(small_run, "the cat", 20, temperature=0)
    whole = greedy.removeprefix("the cat")
    assert harness.generate_until([ask("the cat", {"max_gen_toks": 20})]) == [whole]
    stop = whole[5:7]
    cut = harness.generate_until([ask("the cat", {"max_gen_toks": 20, "until": ["\x00never", stop]})])
    assert cut == [whole[: whole.index(stop)]]
    assert harness.generate_until([ask("the cat", {"max_gen_toks": 20, "until": stop})]) == cut
    three = generate(small_run, "the cat", 3, temperature=0).removeprefix("the cat")
    assert harness.write("the cat", {"max_gen_toks": 3}) == three != whole
    drawn = harness.write("the cat", {"max_gen_toks": 20, "do_sample": True, "temperature": 2.0})
    assert drawn != whole


def test_lm_evaluation_harness_runs_a_local_task(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    rows = [{"start": "the cat", "ends": [" sat", " ran to"], "right": 0}, {"start": "the dog", "ends": [" x", " ran"],
            "right": 1}, {"start": "the", "ends": [" mat", " park"], "right": 0}]  # fmt: skip
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(tmp_path / "task.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "num_fewshot": 0}
    choice = {"task": "local_choice", "output_type": "multiple_choice", "doc_to_text": "{{start}}",
              "doc_to_choice": "{{ends}}", "doc_to_target": "{{right}}", "target_delimiter": ""}  # fmt: skip
    rolling = {"task": "local_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{start}}", "metric_list": [{"metric": "byte_perplexity"}]}  # fmt: skip
    written = {"task": "local_written", "output_type": "generate_until", "doc_to_text": "{{start}}",
               "doc_to_target": "{{ends[0]}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
               "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    tasks = [ConfigurableTask(config=shared | task) for task in (choice, rolling, written)]
    results = lm_eval.simple_evaluate(HarnessModel(small_run), tasks=tasks, bootstrap_iters=0)["results"]
    questions = [Question(row["start"], row["ends"], row["right"]) for row in rows]
    assert results["local_choice"]["acc,none"] == pytest.approx(choose(small_run, questions)["accuracy"])
    logs = HarnessModel(small_run).loglikelihood_rolling([ask(row["start"]) for row in rows])
    perplexity = math.exp(-sum(logs) / sum(len(row["start"]) for row in rows))
    assert results["local_rolling"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-6)
    assert "exact_match,none" in results["local_written"]
