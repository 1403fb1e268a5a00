"""Print text from a checkpoint.

    python sample.py out/run --prompt="def "
"""
import os
from dataclasses import dataclass

from configurator import REQUIRED, ConfigError, run, setting

import torch

import checkpoint
from data.prepare import load_tokenizer
from tensors import is_finite


@dataclass
class Sample:
    """Print text that a checkpoint writes."""
    checkpoint: str = setting(REQUIRED, "directory of a checkpoint, or of a run (its last)", positional=True)
    prompt: str = setting("def ", "text to continue")
    max_new_tokens: int = setting(400, "tokens to write", least=0)
    temperature: float = setting(0.8, "0 takes the likeliest token each time", least=0)
    top_k: int = setting(50, "number of likeliest tokens to choose among; 0: all", least=0)
    seed: int = setting(0, "seed of the choices")
    tokenizer: str | None = setting(None, "bytes, gpt2 or a tokenizer.json; none: as in training")


@torch.no_grad()
def generate(model, ids, c, eos):
    """Yield new token ids after the list `ids`, each from as many of the last ids as the model takes, as the
    settings c say. End before the token `eos`."""
    generator = torch.Generator().manual_seed(c.seed)
    for _ in range(c.max_new_tokens):
        logits = model(torch.tensor([ids[-model.config.longest:]]))[0, -1]  # (V,)
        values, tokens = logits.topk(min(c.top_k or len(logits), len(logits)))
        chosen = 0  # the likeliest
        if c.temperature > 0:
            chosen = torch.multinomial((values / c.temperature).softmax(-1), 1, generator=generator)
        token = int(tokens[chosen])
        if token == eos:
            return
        ids = [*ids, token]
        yield token


def main(c):
    saved = checkpoint.checkpoints(c.checkpoint)
    directory = saved[-1][1] if saved else c.checkpoint
    model = checkpoint.load_model(directory).eval()
    if not all(map(is_finite, model.parameters())):
        raise ConfigError(f"{directory}: its weights are not finite")
    beside = os.path.join(directory, "tokenizer.json")
    known = beside if os.path.exists(beside) else checkpoint.read_state(directory).get("tokenizer")
    name = c.tokenizer or known
    if not name:
        raise ConfigError(f"{directory}: names no tokenizer; give --tokenizer=bytes|gpt2|FILE")
    tokenizer = load_tokenizer(name)
    ids = [int(i) for i in tokenizer.encode([c.prompt])[0]]
    if not ids:
        raise ConfigError("--prompt: is empty")
    if max(ids) >= model.config.vocab_size:
        raise ConfigError("--prompt: has tokens that the model lacks; is this its tokenizer?")
    print(c.prompt + tokenizer.decode(list(generate(model, ids, c, tokenizer.eos_token_id))))


if __name__ == "__main__":
    run(main, Sample)
