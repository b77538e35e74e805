"""Text of number words, and a tokenizer that gives each its number."""

from typing import Any

from transformers import PreTrainedTokenizerFast


class CountingTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that remembers how many characters it was given."""

    num_characters = 0

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        CountingTokenizer.num_characters += len(text)
        return super().__call__(text, *args, **kwargs)


def make_tokenizer(*, framed: bool = False) -> CountingTokenizer:
    """One id for each number word: "w17" is 17; with or without [BOS] and [EOS] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3} | {f"w{index}": index for index in range(4, 5000)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
        )
    CountingTokenizer.num_characters = 0
    make: Any = CountingTokenizer
    found: CountingTokenizer = make(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    return found


def words(start: int, stop: int, *, per_line: int = 10) -> str:
    names = [f"w{index}" for index in range(start, stop)]
    return "\n".join(" ".join(names[i : i + per_line]) for i in range(0, len(names), per_line))
