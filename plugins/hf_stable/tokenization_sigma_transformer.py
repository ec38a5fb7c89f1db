"""The text of a fairseq translation model: Moses' tokens, subword-nmt's subwords and fairseq's dictionaries."""

import importlib
import re
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedTokenizer

from .source import without_source, write_source

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # which fairseq puts before what a dictionary lists
END_OF_WORD = "</w>"


class SigmaTransformerTokenizer(PreTrainedTokenizer):
    """Sentences to the ids that fairseq gives them, and ids back to sentences.

    Source and target may have a dictionary each: `tokenizer(text, text_target=translation)` uses both, decoding the target's
    unless told `use_source_tokenizer=True`. Words and special tokens in the text are no more than text, as in fairseq
    (`split_special_tokens=False` is transformers' other way).

    Args:
        source_dict, target_dict: fairseq's `dict.<language>.txt`; one for both if target_dict is left out.
        bpe_codes: what `subword-nmt learn-bpe` wrote; left out, the text is in the dictionary's tokens already.
        source_lang, target_lang: the languages, for Moses.
        moses: normalise punctuation and tokenise before, detokenise after, as recipes/wmt17_en_de does; needs sacremoses.

    Raises:
        ValueError: a line of a file that is no dictionary's or no code; moses without the languages, or without sacremoses.
    """

    vocab_files_names = {
        "source_dict": "dict.source.txt",
        "target_dict": "dict.target.txt",
        "bpe_codes": "bpe.codes",
    }
    model_input_names = ["input_ids", "attention_mask"]
    _auto_map = {"AutoTokenizer": ["tokenization_sigma_transformer.SigmaTransformerTokenizer", None]}

    def __init__(
        self,
        source_dict: str | Path,
        target_dict: str | Path | None = None,
        bpe_codes: str | Path | None = None,
        source_lang: str | None = None,
        target_lang: str | None = None,
        moses: bool = False,
        bos_token: str = "<s>",
        pad_token: str = "<pad>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        split_special_tokens: bool = True,
        special_tokens_pattern: str = "eos",
        **kwargs,
    ) -> None:
        self.source = FairseqDictionary(source_dict)
        self.target = self.source if target_dict is None else FairseqDictionary(target_dict)
        self.bpe = None if bpe_codes is None else BPE(bpe_codes)
        self.source_lang, self.target_lang, self.moses = source_lang, target_lang, moses
        if moses:
            self.source_moses, self.target_moses = Moses(source_lang), Moses(target_lang)
        self._target_mode = self._decode_source = False
        super().__init__(
            source_lang=source_lang,
            target_lang=target_lang,
            moses=moses,
            bos_token=bos_token,
            pad_token=pad_token,
            eos_token=eos_token,
            unk_token=unk_token,
            split_special_tokens=split_special_tokens,
            special_tokens_pattern=special_tokens_pattern,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Of the source."""
        return len(self.source.symbols)

    def get_vocab(self) -> dict[str, int]:
        """Of the source, with added tokens."""
        return {**self.source.indices, **self.added_tokens_encoder}

    def _switch_to_input_mode(self) -> None:
        self._target_mode = False

    def _switch_to_target_mode(self) -> None:
        self._target_mode = True

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        if self.moses:
            text = (self.target_moses if self._target_mode else self.source_moses).tokenize(text)
        if self.bpe is not None:
            text = " ".join(
                piece for word in text.strip("\r\n ").split(" ") if word for piece in self.bpe.segment(word)
            )
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return (self.target if self._target_mode else self.source).indices.get(token, SPECIALS.index("<unk>"))

    def _convert_id_to_token(self, index: int) -> str:
        symbols = (self.source if self._decode_source else self.target).symbols
        return symbols[index] if index < len(symbols) else "<unk>"

    def _decode(self, token_ids, *args, use_source_tokenizer: bool = False, **kwargs) -> str:
        self._decode_source = use_source_tokenizer
        try:
            return super()._decode(token_ids, *args, **kwargs)
        finally:
            self._decode_source = False

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Subwords joined, and Moses' tokens too."""
        text = f"{' '.join(tokens)} ".replace("@@ ", "").rstrip()
        if self.moses:
            text = (self.source_moses if self._decode_source else self.target_moses).detokenize(text)
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the files as they were read, under the names of `vocab_files_names`."""
        prefix, names = f"{filename_prefix}-" if filename_prefix else "", self.vocab_files_names
        texts = {names["source_dict"]: self.source.text, names["target_dict"]: self.target.text}
        if self.bpe is not None:
            texts[names["bpe_codes"]] = self.bpe.text
        else:  # of a tokenizer that was saved here before
            (Path(save_directory) / f"{prefix}{names['bpe_codes']}").unlink(missing_ok=True)
        paths = [Path(save_directory) / f"{prefix}{name}" for name in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_bytes(text.encode("utf-8"))
        return tuple(map(str, paths))

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> tuple[str, ...]:
        """transformers'; and this file, so that `trust_remote_code=True` loads the tokenizer without this library."""
        if not Path(save_directory).is_file():
            write_source(save_directory, [self._auto_map["AutoTokenizer"][0]])
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | Path) -> dict[str, float]:
        return without_source(working_dir, super()._get_files_timestamps(working_dir))


class FairseqDictionary:
    """`<symbol> <count>` on each line of a file; ids follow the lines, after fairseq's four specials."""

    def __init__(self, path: str | Path) -> None:
        self.text = Path(path).read_bytes().decode("utf-8")
        self.symbols = list(SPECIALS)
        self.indices = {symbol: i for i, symbol in enumerate(SPECIALS)}
        for number, line in enumerate(re.split(r"\r\n|\r|\n", self.text.rstrip("\r\n")), start=1):
            symbol, _, count = line.rstrip().rpartition(" ")
            overwrite = count == "#fairseq:overwrite"
            if overwrite:
                symbol, _, count = symbol.rpartition(" ")
            if not symbol or not re.fullmatch(r"[+-]?\d+", count):
                raise ValueError(
                    f"{path}: line {number} is {line!r}: allowed is '<token> <count> [#fairseq:overwrite]'"
                )
            if symbol in self.indices and not overwrite:
                raise ValueError(
                    f"{path}: line {number} has {symbol!r} a second time: allowed is #fairseq:overwrite there"
                )
            self.indices[symbol] = len(self.symbols)
            self.symbols.append(symbol)


class BPE:
    """subword-nmt's subwords; @@ ends each that is not its word's last (Sennrich et al., 2016, Algorithm 1)."""

    def __init__(self, path: str | Path) -> None:
        self.text = Path(path).read_bytes().decode("utf-8")
        lines, self.version = self.text.replace("\r\n", "\n").rstrip("\n").split("\n"), "0.1"
        if lines[0].startswith("#version:"):
            self.version = lines.pop(0).split()[-1]
        if self.version not in ("0.1", "0.2"):
            raise ValueError(f"{path}: version {self.version}: allowed are 0.1 and 0.2")
        self.ranks: dict[tuple[str, ...], int] = {}
        for rank, line in enumerate(lines):
            pair = tuple(line.strip("\r\n ").split(" "))
            if len(pair) != 2:
                raise ValueError(f"{path}: {line!r}: allowed are two subwords and a space between them")
            self.ranks.setdefault(pair, rank)
        self.cache: dict[str, list[str]] = {}

    def segment(self, word: str) -> list[str]:
        if word not in self.cache:
            self.cache[word] = self._segment(word)
        return self.cache[word]

    def _segment(self, word: str) -> list[str]:
        if len(word) == 1:
            return [word]
        pieces = [*word, END_OF_WORD] if self.version == "0.1" else [*word[:-1], word[-1] + END_OF_WORD]
        while known := [pair for pair in pairwise(pieces) if pair in self.ranks]:
            first, second = min(known, key=self.ranks.get)
            merged, i = [], 0
            while i < len(pieces):
                both = pieces[i : i + 2] == [first, second]
                merged.append(first + second if both else pieces[i])
                i += 2 if both else 1
            pieces = merged
        pieces[-1] = pieces[-1].removesuffix(END_OF_WORD)
        if not pieces[-1]:
            pieces.pop()
        return [f"{piece}@@" for piece in pieces[:-1]] + pieces[-1:]


class Moses:
    """Moses' scripts for one language, by sacremoses: `normalize -c tokenize -a`, and `detokenize`."""

    def __init__(self, lang: str | None) -> None:
        if lang is None:
            raise ValueError("moses = True: source_lang and target_lang are needed, as 'en' and 'de'")
        try:  # not an import statement: transformers would want sacremoses for every tokenizer of this file
            sacremoses = importlib.import_module("sacremoses")
        except ImportError as error:
            raise ValueError("moses = True: sacremoses is missing: pip install sacremoses") from error
        self.normalizer = sacremoses.MosesPunctNormalizer(lang, post_remove_control_chars=True)
        self.tokenizer, self.detokenizer = sacremoses.MosesTokenizer(lang), sacremoses.MosesDetokenizer(lang)

    def tokenize(self, text: str) -> str:
        return self.tokenizer.tokenize(self.normalizer.normalize(text), aggressive_dash_splits=True, return_str=True)

    def detokenize(self, text: str) -> str:
        return self.detokenizer.detokenize(text.split())
