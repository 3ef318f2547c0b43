"""Train a small GPT-NeoX (Pythia architecture) causal LM from a JSON-lines text file.

    python train_neox.py --text TEXT.jsonl --out neox-pd --minutes 52

Writes a Hugging Face checkpoint folder (safetensors, tokenizer) and `training_report.json`.
One document in fifty is held out (by hash of its text) and never trained on.
Runs on CUDA when there is one; on two CPU cores a d_model of 128 sees 5,000 to 10,000 tokens a
second. A run ends by the clock, so another machine gives another model.
"""

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
Ids = NDArray[np.int64]


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """Texts to train on, shuffled, and texts held out."""
    train: list[str] = []
    held: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            bucket = int(hashlib.md5(text[:400].encode()).hexdigest(), 16) % 50
            (held if bucket == 0 else train).append(text)
    random.Random(0).shuffle(train)
    return train, held


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> Any:
    """A byte-level BPE in which "..." is one token: it is the default mask string of sae-pipe."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.token_to_id("...") is None:
        bpe.add_tokens(["..."])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, unk_token=END, model_max_length=context
    )


def encode(tokenizer: Any, texts: list[str]) -> Ids:
    """All texts in one row of ids, an END before each."""
    ids: list[int] = []
    for text in texts:
        ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return np.array(ids, dtype=np.int64)


def build(args: argparse.Namespace, vocab: int) -> Any:
    """The untrained model."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=args.d_model,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 32,
        intermediate_size=4 * args.d_model,
        hidden_act="gelu",
        max_position_embeddings=args.context,
        use_parallel_residual=True,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():  # residual writers start small: 1/sqrt(2 * layers)
        for name, weight in model.named_parameters():
            if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                weight.mul_(1 / math.sqrt(2 * args.layers))
    return model


def loss_of(model: Any, x: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    with torch.autocast(x.device.type, torch.bfloat16):
        logits = model(input_ids=x, use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, x[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, ids: Ids, context: int, device: str) -> float:
    """loss_of over all whole contexts of some ids."""
    model.eval()
    rows = torch.from_numpy(ids[: len(ids) // context * context]).view(-1, context)
    total = 0.0
    for batch in torch.split(rows, 64):
        total += loss_of(model, batch.to(device)).item() * len(batch)
    model.train()
    return total / len(rows)


def optimisers_of(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers." in n]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.AdamW(others, 2e-3, betas=(0.9, 0.95)),
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95),
    ]


def train(model: Any, ids: Ids, args: argparse.Namespace, device: str) -> tuple[int, int]:
    """Train until the time is up; steps and epochs done."""
    optimisers = optimisers_of(model)
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    base = [group["lr"] for group in groups]
    rng = np.random.default_rng(0)
    order = np.empty(0, int)
    start, step, epoch, cursor, offset = time.time(), 0, 0, 0, 0
    while (fraction := (time.time() - start) / (60 * args.minutes)) < 1:
        if cursor + args.batch > len(order):
            offset = int(rng.integers(args.context))
            order = rng.permutation((len(ids) - offset) // args.context)
            cursor, epoch = 0, epoch + 1
        starts = offset + order[cursor : cursor + args.batch] * args.context
        x = np.stack([ids[first : first + args.context] for first in starts])
        cursor += args.batch
        decay = 1.0 if fraction < 0.3 else 0.02 + 0.98 * (1 - fraction) / 0.7
        for group, lr in zip(groups, base, strict=True):
            group["lr"] = lr * min(1, (step + 1) / 50) * decay
        loss = loss_of(model, torch.from_numpy(x).to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            seen = step * args.batch * args.context
            speed = seen / (time.time() - start)
            print(
                f"step {step} epoch {epoch} {seen / 1e6:.1f}M tokens {speed:.0f}/s "
                f"loss {loss.item():.3f}",
                flush=True,
            )
    return step, epoch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_texts, held_texts = read_documents(args.text)
    tokenizer = train_tokenizer(train_texts, args.vocab, args.context)
    train_ids, held_ids = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    held_bytes = sum(len(text.encode()) for text in held_texts)
    mask_id = tokenizer.convert_tokens_to_ids("...")
    print(f"train {len(train_ids):,} tokens, held out {len(held_ids):,}; '...' is {mask_id}")

    model = build(args, len(tokenizer)).to(device)
    steps, epochs = train(model, train_ids, args, device)
    held = evaluate(model, held_ids, args.context, device)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "epochs": epochs,
        "tokens_seen": steps * args.batch * args.context,
        "held_out_loss": held,
        "held_out_bits_per_byte": held / math.log(2) * len(held_ids) / held_bytes,
        "held_out_tokens": len(held_ids),
        "minutes": args.minutes,
        "device": device,
    }
    tokenizer.save_pretrained(args.out)
    model.to(torch.float16).save_pretrained(args.out)
    (args.out / "training_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
