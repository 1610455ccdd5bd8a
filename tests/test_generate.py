"""Decoding with caches against reading everything again, for every family, within a context and beyond it."""

import json
from dataclasses import replace
from itertools import islice, takewhile

import families
import pytest
import test_deepseek
import test_gpt_oss
import test_qwen3_5_moe
import test_qwen3_moe
import torch
from tokenizers import processors

from pithtrain.cli import main
from pithtrain.config import Config, TrainConfig
from pithtrain.train.generate import decode, generate, pick
from pithtrain.train.run import Run, open_run
from pithtrain.train.tokenizer import END_OF_TEXT, end_of_text, load_tokenizer, save_tokenizer, train_tokenizer

FAMILIES = {
    "qwen3-moe": test_qwen3_moe.SHAPES["untied"][0],
    "deepseek-v2-lite": test_deepseek.SHAPES["V2-Lite"][0],
    "deepseek-v3": test_deepseek.SHAPES["V3"][0],
    "gpt-oss": test_gpt_oss.BASE,
    # Mild: with a smaller epsilon, weights nudged by one rounding error move a token's logits by 4e-5.
    "qwen3.5-moe": replace(test_qwen3_5_moe.BASE, **test_qwen3_5_moe.MILD),
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def recompute(model, tokens, context, choose):
    """What `decode` promises, with no cache: everything seen is read again for each token."""
    tokens, first = list(tokens), max(0, len(tokens) - context)
    while True:
        if len(tokens) - first > context:
            first = len(tokens) - max(1, context // 2)
        window = torch.tensor([tokens[first:]])
        with torch.no_grad():
            hidden, _ = model(window, torch.arange(window.shape[1]))
        tokens.append(choose(model.logits(hidden[0, -1])))
        yield tokens[-1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt, context", [(1, 40), (11, 40), (20, 12), (5, 7), (2, 2), (8, 8)])
def test_decoding_is_full_recomputation_token_for_token(name, prompt, context):
    model = families.random_model(FAMILIES[name])
    tokens = families.text(FAMILIES[name], 1, prompt)[0][0].tolist()
    seen = []

    def greedy(logits):
        seen.append(logits)
        return int(logits.argmax())

    found = list(islice(decode(model, tokens, context, greedy), 25))
    cached, seen = seen, []
    assert found == list(islice(recompute(model, tokens, context, greedy), 25))
    assert len(set(found)) > 2, "a model that repeats itself shows nothing"
    assert max(families.error(a, b) for a, b in zip(cached, seen, strict=True)) < 2e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_writes_what_full_recomputation_gives_made_here_or_imported(name, tmp_path, capsys):
    tokenizer = train_tokenizer(["def run(): return 1\n"] * 50, vocab_size=270)
    model = families.make_run(replace(FAMILIES[name], vocab_size=270), tmp_path / "run")
    save_tokenizer(tokenizer, tmp_path / "run/tokenizer.json")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    prompt = tokenizer.encode("def run").ids
    written = islice(recompute(model, [end_of_text(tokenizer), *prompt], 256, lambda s: int(s.argmax())), 30)
    expected = tokenizer.decode([*prompt, *takewhile(lambda token: token != end_of_text(tokenizer), written)])
    for run in ("run", "back"):
        capsys.readouterr()
        command = ["generate", str(tmp_path / run), "--prompt", "def run", "--tokens", "30", "--temperature", "0"]
        assert main(command) == 0 and capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_those_of_full_recomputation(name):
    model, draws = families.random_model(FAMILIES[name]), []
    for way in (decode, recompute):
        generator = torch.Generator().manual_seed(3)
        tokens = way(model, [7, 9], 10, lambda logits, g=generator: pick(logits, 0.8, 20, g))
        draws.append(list(islice(tokens, 25)))
    assert draws[0] == draws[1]


def test_a_context_of_one_token_sees_the_last_alone():
    model = families.random_model(FAMILIES["deepseek-v3"])

    def greedy(logits):
        return int(logits.argmax())

    found = list(islice(decode(model, [3, 4], 1, greedy), 5))
    assert found == list(islice(recompute(model, [4], 1, greedy), 5))


def test_each_token_is_read_once_while_the_context_has_room(monkeypatch):
    model, read = families.random_model(FAMILIES["qwen3-moe"]), []
    forward = type(model).forward

    def counted(self, x, positions, **options):
        read.append((x.shape[1], positions.tolist()))
        return forward(self, x, positions, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    list(islice(decode(model, [1, 2, 3], 6, lambda logits: 5), 7))
    assert [count for count, _ in read] == [3, 1, 1, 1, 3, 1, 1]
    assert [positions[-1] for _, positions in read] == [2, 3, 4, 5, 2, 3, 4]


def test_generate_ends_at_end_of_text_and_repeats_with_its_seed():
    tokenizer = train_tokenizer(["def run(): return 1\n"] * 50, vocab_size=270)
    model = families.random_model(test_qwen3_moe.shape(vocab_size=270, tie_embeddings=False))
    run = Run(Config(train=TrainConfig(sequence_length=64)), tokenizer, model, 0)
    one, two, other = (generate(run, "def ", 20, seed=seed) for seed in (0, 0, 1))
    assert one == two != other and one.startswith("def ")
    assert run.opened([5]) == [tokenizer.token_to_id(END_OF_TEXT), 5]
    with torch.no_grad():
        model.head.weight[:] = 0
        model.norm.weight[:] = 0  # all logits are zero, so the likeliest is token 0: the end of text
    assert generate(run, "def ", 20, temperature=0) == "def "
    assert generate(run._replace(published={"eos_token_id": [4, 9]}), "def ", 20, temperature=0) == "def "


@pytest.mark.parametrize("temperature, top_k", [(0.0, 0), (1e-40, 0), (1.0, 1)])
def test_pick_takes_the_likeliest(temperature, top_k):
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert pick(logits, temperature, top_k, torch.Generator()) == 1


def test_the_tokenizer_of_another_model_opens_and_ends_texts_its_way(tmp_path):
    tokenizer = train_tokenizer(["def run(): return 1\n"] * 50, vocab_size=270)
    text = tokenizer.to_str().replace(END_OF_TEXT, "<｜end▁of▁sentence｜>")
    (tmp_path / "tokenizer.json").write_text(text)
    theirs = load_tokenizer(tmp_path / "tokenizer.json")
    run = Run(Config(), theirs, None, 0)
    assert end_of_text(theirs) == end_of_text(tokenizer) == 0
    assert run.opened([5]) == [0, 5] and run.opened([]) == [0]
    run = run._replace(published={"vocab_size": 270, "bos_token": "d"})
    assert run.opened([5]) == [5] and run.opened([]) == [0]  # nothing stands before a text, but something must be read
    d = theirs.token_to_id("d")
    for bos in ("d", {"content": "d"}):
        run = run._replace(published={"add_bos_token": True, "bos_token": bos})
        assert run.opened([5]) == [d, 5] and run.opened([]) == [d]
    theirs.post_processor = processors.TemplateProcessing(single="d $A", special_tokens=[("d", 7)])
    assert run.opened([5]) == [7, 5]


def test_an_imported_model_ends_where_transformers_does_and_knows_its_positions(tmp_path, capsys):
    hf = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(["def run(): return 1\n"] * 50, vocab_size=270)
    families.make_run(replace(test_qwen3_moe.SHAPES["untied"][0], vocab_size=270), tmp_path / "run")
    save_tokenizer(tokenizer, tmp_path / "run/tokenizer.json")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ids = tokenizer.encode("def run").ids
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def continued(**ends):
        given = torch.tensor([[0, *ids]])
        fixed = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(given)}
        whole = theirs.generate(given, **fixed, **ends)
        return whole[0, 1 + len(ids) :].tolist()

    free = continued(eos_token_id=None)
    stop = free[9]  # an ordinary token, which the published settings call an end
    for name, ends in (("generation_config.json", [stop, 0]), ("config.json", stop)):
        table = json.loads((tmp_path / "out" / name).read_text())
        (tmp_path / "out" / name).write_text(json.dumps(table | {"eos_token_id": ends, "max_position_embeddings": 40}))
        expected = continued(eos_token_id=ends)
        assert expected == free[: free.index(stop) + 1] and len(expected) < 30
        assert main(["import", str(tmp_path / "out"), str(tmp_path / name)]) == 0
        capsys.readouterr()
        command = ["generate", str(tmp_path / name), "--tokens", "30", "--temperature", "0", "--prompt"]
        assert main([*command, "def run"]) == 0
        assert capsys.readouterr().out == tokenizer.decode(ids + expected[:-1]) + "\n"
        (tmp_path / "out" / "generation_config.json").unlink(missing_ok=True)  # the second time config.json says it
    run = open_run(tmp_path / "config.json")
    assert run.context == 40
    (tmp_path / "config.json" / "published" / "config.json").write_text('{"max_position_embeddings": 300}')
    prompt = "run" * 200
    assert 256 < len(tokenizer.encode(prompt).ids) + 1 < 700
    assert main([*command[:1], str(tmp_path / "config.json"), *command[2:], prompt]) == 2
    assert "and the model knows 300 positions" in capsys.readouterr().err
