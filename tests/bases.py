"""Folders of tiny bases as they are found on a disk: a random model and a tokenizer that reads any Unicode."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

EOS = "<|endoftext|>"
UNICODE_TEXT = "naïve café über straße 北京大学 привет мир 😀👍🏽 hello world the end\n"


def unicode_tokenizer(size: int = 320) -> Tokenizer:
    """Byte pairs over all 256 bytes, and the special token `EOS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False)
    tokenizer.train_from_iterator([UNICODE_TEXT * 9], trainer)
    return tokenizer


def save_gpt2(folder: Path, vocabulary: int, context: int = 16) -> None:
    """A GPT-2 with random weights, as `save_pretrained` writes it."""
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=vocabulary, n_positions=context,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)


def save_base(folder: Path) -> Path:
    """A tiny GPT-2 and its Unicode tokenizer, in a new folder."""
    tokenizer = unicode_tokenizer()
    save_gpt2(folder, tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
