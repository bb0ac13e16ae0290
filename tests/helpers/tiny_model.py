"""Folder with a two-layer model and a tokenizer of 512 tokens, made offline.

Run by the Python of an engine's environment: ``python tests/helpers/tiny_model.py FOLDER [WIDTH]``,
with the width of its layers, 128 if left out, a multiple of 32. There are no weights: engines draw
them at random (``--load-format dummy``) or need none.
"""

import sys

LINES = ["the clock of a card falls and its power falls faster", "many prompts wait in one queue"]


def main(folder: str, width: int = 128) -> None:
    # Only where an engine is installed; pytest imports this file to look for doctests.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 32, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
