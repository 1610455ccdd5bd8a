"""Loads the exported model with transformers and measures its loss: python same_loss.py OUT."""

import json
import math
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    out = Path(sys.argv[1])
    try:
        said = json.loads((out / "evaluation.json").read_text())
        loss, count = float(said["nats_per_token"]), int(said["tokens"])
        rows = json.loads((out / "held_out.json").read_text())
        predicted = sum(len(row) - 1 for row in rows)
        if predicted != count or count < 1000:
            return print(f"FAIL {count} tokens are reported, held_out.json has {predicted}, 1,000 are needed")
        if not list((out / "model").glob("*.safetensors")) or not (out / "model" / "tokenizer.json").is_file():
            return print("FAIL model: no safetensors file or no tokenizer.json")

        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        words = Tokenizer.from_file(str(out / "model" / "tokenizer.json")).get_vocab_size()
        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
        vocabulary = model.config.get_text_config().vocab_size
        if not all(0 <= token < min(words, vocabulary) for row in rows for token in row):
            return print(f"FAIL held_out.json has ids beyond the {min(words, vocabulary)} of tokenizer and model")
        total = 0.0
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([row])
                logits = model(ids).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    except Exception as error:
        return print(f"FAIL {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    again = total / count
    if not abs(again - loss) <= 1e-3 * again:
        return print(f"FAIL transformers measures {again:.5f} nats a token, reported are {loss:.5f}")
    if again > 0.9 * math.log(vocabulary):
        return print(f"FAIL {again:.3f} nats a token; a uniform guess has {math.log(vocabulary):.3f}")
    print(f"PASS {again:.5f} nats a token in transformers, {loss:.5f} reported, {count} tokens")


main()
