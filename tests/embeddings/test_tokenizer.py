"""What stands in a caption is text: special tokens, half emoji and all."""

import pytest
import torch
from tiny import build_tiny_tokenizer

from csdiff.embeddings import CaptionTokenizer, load_caption_tokenizer, load_text_encoder


def unigram():
    """A SentencePiece-like tokenizer, in whose vocabulary the end of the text is a piece like any other."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz/<>"]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


@pytest.mark.parametrize("make", [lambda: build_tiny_tokenizer(max_length=64), unigram], ids=["bpe", "unigram"])
def test_a_special_token_in_a_caption_is_text(make):
    tokenizer = make()
    own = len(tokenizer("").input_ids)
    tokenize = CaptionTokenizer(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids)
    for token in [*tokenizer.all_special_tokens, "＜/s＞"]:
        captions = [f"a cat{token} and a dog", f"{token}", "a cat"]
        ids, mask = tokenize(captions)
        found = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        unknown = tokenizer.unk_token_id if token != tokenizer.unk_token else -1
        counts = [int((torch.isin(row, special) & (row != unknown)).sum()) for row in found]
        assert max(counts) <= own, token
        # Nothing behind it is lost.
        text = tokenizer.decode(found[0], skip_special_tokens=True).replace(" ", "")
        assert text.startswith("acat")
        assert text.endswith("andadog")
        assert tokenize.lengths(captions)[2] == len(found[2])


def test_the_end_of_text_in_a_caption_does_not_cut_it():
    encoder = load_text_encoder("tiny-clip")
    embed = [encoder.embed([caption]) for caption in ("a<|endoftext|>b", "a", "a<|endoftext|>c")]
    assert not torch.equal(embed[0], embed[1])
    assert not torch.equal(embed[0], embed[2])
    ids, _ = load_caption_tokenizer("tiny-clip")(["a<|endoftext|>b"])
    assert torch.equal(ids, encoder.caption_tokenizer(["a<|endoftext|>b"])[0])


def test_half_a_surrogate_pair_becomes_the_replacement_character(tiny_clip):
    encoder = load_text_encoder(tiny_clip)
    assert torch.equal(encoder.embed(["a\ud83d"]), encoder.embed(["a\ufffd"]))
