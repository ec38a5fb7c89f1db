"""nanoGPT's data of characters: its meta.pkl -> a tokenizer of transformers."""

import pickle
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class _PlainValues(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise ValueError(f"it holds a {module}.{name}: allowed are plain values")


def character_tokenizer(meta: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A character is a token, with the id that meta.pkl's `stoi` gives it; any other character is an error, as in nanoGPT.

    Raises:
        ValueError: no meta.pkl with such a `stoi`, or another number of characters than `vocab_size`.
    """
    with meta.open("rb") as file:
        try:
            ids = _PlainValues(file).load()["stoi"]
            tokenizer = Tokenizer(models.WordLevel(ids))
        except (EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{meta}: no meta.pkl of characters, with their ids as stoi ({error})") from error
    if len(ids) != vocab_size:
        raise ValueError(f"{meta}: {len(ids)} characters, and the model has {vocab_size}")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
