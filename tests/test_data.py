"""peft_teach.data: splits that keep apart what they say, lists that are the same each time, exact scores."""

import json
import random

import pytest
import torch

from peft_teach import data
from peft_teach.models import load


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_data_set_has_a_card(name):
    card = data.describe(name)
    assert all(vars(card).values())


def test_an_unknown_name_or_split_says_what_there_is():
    with pytest.raises(KeyError, match="python_docs, movie_reviews, extraction"):
        data.describe("imdb")
    for call in (data.python_docs, data.movie_reviews, lambda split: data.extraction(1, split)):
        with pytest.raises(ValueError, match="'train'.*got 'dev'"):
            call(split="dev")


# ---- the Python documentation: it differs between Python versions, so nothing exact is said of it ----


def test_the_topics_of_test_are_not_in_train_nor_are_their_paragraphs():
    train, test = data.python_topics("train"), data.python_topics("test")
    assert train and test and not set(train) & set(test)
    assert set(test) <= data.TEST_TOPICS

    def paragraphs(topics):
        found = {" ".join(p.split()) for text in topics.values() for p in text.split("\n\n")}
        return {p for p in found if len(p) >= 40}

    assert not paragraphs(train) & paragraphs(test)
    share = len(data.python_docs(split="test")) / sum(len(data.python_docs(split=s)) for s in ("train", "test"))
    assert 0.10 < share < 0.25


def test_the_documentation_is_the_same_each_time_and_leaves_the_random_state():
    before = random.getstate(), torch.get_rng_state()
    assert data.python_docs() == data.python_docs()
    assert len(data.python_docs()) > 200_000
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("block", [64, 128])
def test_blocks_of_tokens(block, capfd):
    _, tokenizer = load("smollm2-135m")
    capfd.readouterr()
    ids = data.python_docs(tokenizer, "test", block=block)
    assert ids.dtype == torch.int64 and ids.shape[1] == block and len(ids) > 4000 // block
    text = tokenizer.decode(ids.flatten(), skip_special_tokens=True)
    joined = "".join(data.python_topics("test").values())
    assert joined.startswith(text) and len(joined) - len(text) < 10 * block
    assert (ids == tokenizer.eos_token_id).sum() == len(data.python_topics("test")) - 1
    assert capfd.readouterr() == ("", "")  # no warning that a topic is longer than the model can read


def test_a_block_of_nothing_is_refused():
    with pytest.raises(ValueError, match="block"):
        data.python_docs(load("smollm2-135m")[1], block=0)


# ---- movie reviews ----


@pytest.fixture(scope="module")
def films():
    return {split: data.reviews_by_film(split) for split in ("train", "validation", "test")}


def test_no_film_is_on_two_sides(films):
    names = [film for split in films.values() for film in split]
    assert len(names) == len(set(names)) == 507
    reviews = {split: {r.text.lower() for rs in films[split].values() for r in rs} for split in films}
    # two stock phrases were written about several films; nothing longer is shared
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert all(len(text) < 30 for text in reviews[a] & reviews[b])


def test_reviews_are_text_and_label(films):
    counts = {split: len(data.movie_reviews(split)) for split in films}
    assert counts == {"train": 8776, "validation": 1620, "test": 2358}
    text, label = data.movie_reviews("test")[0]
    assert text == text.strip() != "" and label in (0, 1)
    assert data.movie_reviews("test") == data.movie_reviews("test")


def test_the_majority_baseline():
    records = data.movie_reviews("test")
    assert data.majority_baseline(records) == pytest.approx(0.595, abs=5e-4)
    assert data.majority_baseline([("a", 0), ("b", 0), ("c", 1)]) == pytest.approx(2 / 3)


# ---- extraction ----


def fits(example, split):
    """Does the sentence come from the templates and entities of this split alone?"""
    says, known = json.loads(example.target), data.ENTITIES[split]
    first, last = says["person"].split()
    return (
        any(template.format(**says) == example.text for template in data.TEMPLATES[split])
        and first in known["first"] and last in known["last"]
        and says["town"] in known["town"] and says["thing"] in known["thing"]
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_train_and_test_share_neither_template_nor_entity(seed):
    assert not set(data.TEMPLATES["train"]) & set(data.TEMPLATES["test"])
    names = {s: [e for kind in data.ENTITIES[s].values() for e in kind] for s in ("train", "test")}
    everything = " ".join(data.TEMPLATES["train"] + data.TEMPLATES["test"])
    for name in names["train"] + names["test"]:
        assert name not in everything
    assert not any(a in b or b in a for a in names["train"] for b in names["test"])
    for split in ("train", "test"):
        assert all(fits(example, split) for example in data.extraction(300, split, seed))


def test_the_random_split_draws_from_both():
    made = data.extraction(300, "random")
    assert 0 < sum(fits(e, "train") for e in made) < 300
    words = " ".join(e.text for e in made)
    assert all(e in words for s in ("train", "test") for kind in data.ENTITIES[s].values() for e in kind)


@pytest.mark.parametrize("split", ["train", "test", "random"])
def test_extraction_is_seeded_and_its_sentences_differ(split):
    random.seed(3)
    before = random.getstate()
    made = data.extraction(200, split, seed=4)
    assert random.getstate() == before
    assert made == data.extraction(200, split, seed=4) != data.extraction(200, split, seed=5)
    assert made[:50] == data.extraction(50, split, seed=4)  # a longer list starts like a shorter one
    assert len({e.text for e in made}) == 200
    assert all(data.extraction_score(e.target, e.target) == 1 for e in made)
    assert all(data.extraction_score(e.text, e.target) == 0 for e in made)  # copying scores nothing
    assert data.extraction(0, split) == []


def test_extraction_is_the_same_on_every_machine():
    assert data.extraction(1, seed=1)[0] == data.Extraction(
        text="In Krakow, Grace Costa bought 83 chairs.",
        target='{"person": "Grace Costa", "town": "Krakow", "thing": "chairs", "count": 83}',
    )


def test_a_number_of_sentences_that_there_are_not_is_refused():
    with pytest.raises(ValueError, match="between 0 and 2000"):
        data.extraction(10**6)


TARGET = '{"person": "Anna Adler", "town": "Lisbon", "thing": "lamps", "count": 3}'


@pytest.mark.parametrize(
    "output, score",
    [
        (TARGET, 1),
        (f"\n  {TARGET} \n", 1),
        ('{"count":3,"thing":"lamps","town":"Lisbon","person":"Anna Adler"}', 1),
        (TARGET.replace("3", "4"), 0),
        (TARGET.replace("3", '"3"'), 0),
        (TARGET.replace("3", "3.0"), 0),
        (TARGET.replace("lamps", "Lamps"), 0),
        (TARGET.replace(', "count": 3', ""), 0),
        (TARGET.replace("}", ', "note": ""}'), 0),
        (TARGET.replace("}", ', "count": 3}'), 0),
        (f"Here it is: {TARGET}", 0),
        (TARGET + TARGET, 0),
        (f"[{TARGET}]", 0),
        ("", 0),
        ("null", 0),
        ("[" * 100_000, 0),
    ],
)
def test_the_score_is_exact(output, score):
    assert data.extraction_score(output, TARGET) == score


def test_true_is_not_one():
    assert data.extraction_score('{"count": true}', '{"count": 1}') == 0
