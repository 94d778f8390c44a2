"""What we rely on in other libraries, as dated tests.

    @fact("gguf-reads", library="transformers", seen_in="5.23.0", chapters="03 11")
    def test_a_gguf_file_loads(): ...

A fact is an ordinary test (fixtures and parametrize work). When it fails, the failure says which
release it was last seen in, which one is here, and which chapters to revise. Faults of libraries are
facts too, not xfails: when one is mended we want to know.
"""

import functools
import importlib.metadata

import pytest

FACTS = {}  # id → (where, library, seen_in, chapters)


class ChangedUpstream(AssertionError):
    """A fact that no longer holds."""


def fact(id, library, seen_in, chapters):
    """Mark a test as a fact about `library`, last seen in its version `seen_in`.

    `chapters` are the numbers of those that lean on it: "03 11", or ["03", "11"].
    """
    chapters = chapters.split() if isinstance(chapters, str) else list(chapters)

    def decorate(test):
        where = f"{test.__module__}.{test.__qualname__}"
        if FACTS.get(id, (where,))[0] != where:
            raise ValueError(f"two facts have the id {id!r}: {FACTS[id][0]} and {where}")
        FACTS[id] = (where, library, seen_in, chapters)

        @functools.wraps(test)
        def run(*args, **kwargs):
            try:
                return test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:  # a skip passes through
                raise ChangedUpstream(
                    f"changed upstream: revise chapters {', '.join(chapters)}\n"
                    f"fact {id!r} of {library} was seen in {seen_in}; here is {version(library)}\n"
                    f"{type(error).__name__}: {error}"
                ) from error

        return run

    return decorate


def version(library):
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "no such package (or a part of Python itself)"
