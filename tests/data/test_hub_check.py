"""A dataset that the hub does not have is said at once; being offline is no reason to refuse a plan."""

from collections.abc import Callable

import pytest

from gqa_convert.data.documents import SourceSpec
from gqa_convert.data.hub_check import missing_dataset
from gqa_convert.errors import HubError

SPEC = SourceSpec(kind="hub", paths=("some/dataset",), revision="v9")


def answering(error: Exception | None) -> Callable[..., None]:
    def ask(name: str, *, revision: str | None, timeout: float) -> None:
        assert (name, revision) == ("some/dataset", "v9")
        assert timeout <= 10
        if error is not None:
            raise error

    return ask


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    cls: type[Exception] = getattr(errors, name)
    return cls.__new__(cls, "no")  # what it is made from differs between versions of the library


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("RepositoryNotFoundError", "some/dataset: the hub has no dataset of that name"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("GatedRepoError", "is gated"),
    ],
)
def test_what_the_hub_does_not_have_is_said(name: str, problem: str) -> None:
    with pytest.raises(HubError, match=problem):
        missing_dataset(SPEC, answering(hub_error(name)))


@pytest.mark.parametrize("error", [ConnectionError("down"), TimeoutError("slow"), RuntimeError("odd")])
def test_a_hub_that_does_not_answer_is_a_note(error: Exception) -> None:
    assert "some/dataset: not looked for" in missing_dataset(SPEC, answering(error))


def test_what_is_there_is_nothing_to_say() -> None:
    assert missing_dataset(SPEC, answering(None)) is None
