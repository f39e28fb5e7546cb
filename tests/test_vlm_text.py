"""vlm.py, where text begins: where a response ends, how long it is, and what its tokens read."""

import pytest
import torch
from helpers import picture, pictures, plain_logp
from hypothesis import example, given
from hypothesis import strategies as st

import tiny
import vlm

END = "<end>"


def texts_of(model, ids):
    """The texts of one response's tokens."""
    tokens = torch.tensor([ids], dtype=torch.long)
    return vlm.token_texts(model, tokens, torch.ones_like(tokens, dtype=torch.bool), END)[0]


def joined_texts(model, tokens, mask):
    """Each response's whole text."""
    return ["".join(texts) for texts in vlm.token_texts(model, tokens, mask, END)]


# ----------------------------------------------------------------------- ends, stops, lengths


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that has learned three texts by heart, each with its end: three seconds."""
    torch.manual_seed(0)
    model = vlm.load(tiny.build_tiny(tmp_path_factory.mktemp("taught"), 16))
    texts = {"a": "12", "b": "3+5=8;8", "c": "<answer>7</answer>99"}
    inputs = vlm.encode(model, list(texts), [None] * 3)
    tokens, mask = vlm.encode_responses(model, list(texts.values()))
    optimizer = torch.optim.Adam(model.model.parameters(), 3e-3)
    for _ in range(80):
        loss = -vlm.score(model, inputs, tokens, mask)[0].sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model, texts, inputs


def test_encoded_responses_end_with_eos_inside_the_mask(sharp):
    tokens, mask = vlm.encode_responses(sharp, ["12", "<answer>7</answer>", ""])
    lengths = mask.sum(1)
    assert lengths.tolist() == [3, 4, 1]
    assert (tokens[range(3), lengths - 1] == sharp.eos_ids[0]).all()
    assert sharp.tokenizer.decode(tokens[1][mask[1]][:-1]) == "<answer>7</answer>"


def test_eos_is_learned_although_it_is_the_padding(taught):
    model, texts, inputs = taught
    assert model.tokenizer.pad_token_id in model.eos_ids
    for temperature in (0.0, 0.5):
        tokens, mask = vlm.generate(model, inputs, 20, temperature)
        assert joined_texts(model, tokens, mask) == [text + END for text in texts.values()]
        assert mask.sum(1).tolist() == [3, 8, 6]
        assert tokens.shape[1] == 8  # the longest, and no step more
        assert (tokens[range(3), mask.sum(1) - 1] == model.eos_ids[0]).all()
    _, short = vlm.generate(model, inputs, 5, 0.0)
    assert short.sum(1).tolist() == [3, 5, 5]  # ended by max_new_tokens


def test_the_stop_string_ends_a_row_and_belongs_to_it(taught):
    model, texts, inputs = taught
    tokens, mask = vlm.generate(model, inputs, 20, 0.0, stop="</answer>")
    expected = [texts["a"] + END, texts["b"] + END, "<answer>7</answer>"]
    assert joined_texts(model, tokens, mask) == expected


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there(taught):
    """A continuation of a response that was cut inside the stop string, or right behind it."""
    model, _, inputs = taught
    tokens, mask = vlm.generate(model, inputs, 20, 0.0, stop="=8;")
    end, rows = int(mask[1].sum()), torch.tensor([1])  # "3+5=8;", and "8" would follow
    for taken, left in ((end - 1, 1), (end, None)):
        lengths = torch.tensor([taken])
        prompt = vlm.extended(vlm.take(inputs, rows), tokens[rows], lengths)
        onward, written = vlm.generate(model, prompt, 5, 0.0, stop="=8;")
        if left is None:
            assert int(written.sum()) > 1, "the prompt's own stop string ends nothing"
        else:
            assert int(written.sum()) == left and onward[0, 0] == tokens[1, end - 1]


def test_a_stop_string_may_span_several_tokens(taught):
    model, texts, inputs = taught
    tokens, mask = vlm.generate(model, inputs, 20, 0.0, stop="=8;")
    assert joined_texts(model, tokens, mask) == [texts["a"] + END, "3+5=8;", texts["c"] + END]


STOPS = [("sharp", "e"), ("sharp", "text"), ("sharp", "\n"), ("bpe", "a"), ("bpe", "text")]
STOPS += [("bpe", "\n"), ("bpe", " "), ("bpe", "wide")]


@pytest.mark.parametrize("name, stop", STOPS)
def test_a_stop_string_ends_the_rows_that_wrote_it_and_no_others(request, name, stop):
    """The same random stream with and without it: finished rows must not move the others."""
    model = request.getfixturevalue(name)
    inputs = vlm.encode(model, ["ab", "c"] * 32, [None] * 64)

    def sample(stop=None):
        torch.manual_seed(3)
        return vlm.generate(model, inputs, 40, 3.0, stop=stop)

    free, free_mask = sample()
    texts = joined_texts(model, free, free_mask)
    if stop == "text":  # three characters that some row is known to write
        stop = next(t[6:9] for t in texts if t[6:9].isascii() and END not in t[:12])
    if stop == "wide":  # a character of several bytes
        stop = next(c for text in texts for c in text if c > "\x7f" and c != "\ufffd")
    tokens, mask = sample(stop)
    stopped_rows = 0
    for row in range(64):
        ids = free[row][free_mask[row]].tolist()
        lengths = range(1, len(ids) + 1)
        stops = [n for n in lengths if stop in model.tokenizer.decode(ids[:n])]
        if stops:
            stopped_rows += 1
            ids = ids[: stops[0]]
        assert tokens[row][mask[row]].tolist() == ids
    assert stopped_rows
    assert tokens.shape[1] == mask.sum(1).max()


def test_the_padding_id_inside_a_response_is_a_token_like_any_other(sharp):
    """Padding is by length: the tokens before and after it keep their scores and their place."""
    eos = sharp.eos_ids[0]
    ids = [20, eos, 30, eos, 40]
    tokens = torch.tensor([[*ids, eos, eos], [50] * 7])
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    inputs = vlm.encode(sharp, ["a", "longer"], [picture(0), picture(1)])
    logp, _ = vlm.score(sharp, inputs, tokens, mask)
    expected = plain_logp(sharp, inputs, 0, ids)  # (5, V)
    torch.testing.assert_close(logp[0, :5], expected[range(5), ids], rtol=0, atol=1e-4)
    assert (logp[0, 5:] == 0).all() and (logp[0, :5] < 0).all()


# -------------------------------------------------------------------------------- token texts


def test_token_texts_join_to_the_response(sharp):
    inputs = vlm.encode(sharp, ["Sum the dice.", "?"] * 8, pictures(16))
    torch.manual_seed(0)
    tokens, mask = vlm.generate(sharp, inputs, 40, stop="e")
    for row, pieces in enumerate(vlm.token_texts(sharp, tokens, mask, END)):
        ids = tokens[row][mask[row]].tolist()
        assert len(pieces) == len(ids)
        if ids[-1] in sharp.eos_ids:
            assert pieces.count(END) == 1
            assert "".join(pieces) == sharp.tokenizer.decode(ids[:-1]) + END
        else:
            assert pieces.count(END) == 0
            assert "".join(pieces) == sharp.tokenizer.decode(ids)


def test_byte_level_texts_lose_nothing(bpe):
    """Characters of several bytes span tokens: the last one brings the character, so that a
    response which ends anywhere before lacks this character and no other."""

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    @example("the answer is 🎲🎲 naïve 骰子\n")
    def check(text):
        ids = bpe.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = texts_of(bpe, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
        for n in range(1, len(ids)):
            shorter = "".join(texts_of(bpe, ids[:n])).rstrip("\ufffd")
            beginning = "".join(pieces[:n]).rstrip("\ufffd")
            assert text.startswith(shorter) and shorter.startswith(beginning)

    check()


def test_a_character_comes_with_its_last_byte(bpe):
    # a snowman: three bytes, never shown to the tokenizer in training
    ids = bpe.tokenizer("a☃b", add_special_tokens=False)["input_ids"]
    assert texts_of(bpe, ids) == ["a", "", "", "☃", "b"]
    assert "".join(texts_of(bpe, ids[:3])).rstrip("\ufffd") == "a"


def test_any_ids_give_texts(bpe):
    """Random bytes are what an untrained policy writes. What is not valid UTF-8 reads as U+FFFD, as
    in `decode`."""
    allowed = [i for i in range(len(bpe.tokenizer)) if not bpe.banned[i] and i not in bpe.eos_ids]

    @given(st.lists(st.sampled_from(allowed), max_size=40))
    def check(ids):
        pieces, whole = "".join(texts_of(bpe, ids)), bpe.tokenizer.decode(ids)
        assert whole.startswith(pieces)
        assert pieces.replace("\ufffd", "") == whole.replace("\ufffd", "")

    check()


def test_text_before_an_unfinished_character_is_not_lost(bpe):
    """Some tokens hold a whole character and the first byte of another: as the last one, they bring
    the whole one."""
    texts = {i: bpe.tokenizer.decode([i]) for i in range(len(bpe.tokenizer))}
    half = next(i for i, t in texts.items() if t.endswith("\ufffd") and t[0] != "\ufffd")
    first = texts[half][0]
    assert "".join(texts_of(bpe, [half]))[:1] == first
    assert "".join(texts_of(bpe, [half, bpe.eos_ids[0]]))[:1] == first
