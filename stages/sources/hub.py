"""A dataset of the Hugging Face Hub, streamed with the datasets library; nothing is downloaded.

A dataset that has subsets is named `owner/name:subset`. Going on inside a large JSON or compressed
shard reads that shard again up to the position: the library's own rule.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from ...storage.errors import InputError, NetworkError
from .base import Json, Row, RowStream

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_LOCAL_HINT = (
    "Pass local text instead: --dataset FILE, a folder or a glob of .jsonl, .jsonl.zst, .jsonl.gz, "
    ".parquet or .txt files."
)


class HubReader:
    """One split of one dataset at one commit. A position is the library's own state.

    A local folder in the layout of a Hub dataset works too, without a revision.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, dataset: str, split: str, revision: str | None, *, folder: bool = False
    ) -> None:
        self._id, colon, subset = (dataset, "", "") if folder else dataset.partition(":")
        self._name, self._subset, self._split = dataset, subset if colon else None, split
        self._commit = None if folder else _commit(self._id, revision)
        self._dataset = self._load()

    def identity(self) -> Json:
        return {
            "dataset": self._id,
            "subset": self._subset,
            "split": self._split,
            "revision": self._commit,
        }

    def columns(self) -> list[str] | None:
        features = self._dataset.features
        return None if features is None else list(features)

    def rows(self, position: Any) -> RowStream:
        dataset = self._load()  # its own, because the library keeps the position in the dataset
        if position is not None:
            dataset.load_state_dict(position)
        return _Rows(self._name, dataset)

    def _load(self) -> Any:
        import datasets  # here: it takes seconds

        with _quiet_datasets():
            try:
                return datasets.load_dataset(
                    self._id,
                    self._subset,
                    split=self._split,
                    revision=self._commit,
                    streaming=True,
                )
            except ConnectionError as error:
                raise _no_network(self._id) from error
            except (ValueError, RuntimeError, FileNotFoundError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise InputError(
                    f"Dataset {self._name!r} could not be opened: {reason}. Pass another --split, "
                    "or name a subset as owner/name:subset."
                ) from error


class _Rows(RowStream):
    def __init__(self, name: str, dataset: Any) -> None:
        self._name, self._dataset, self._taken = name, dataset, 0
        self._rows = iter(dataset)

    def position(self) -> Any:
        return self._dataset.state_dict()

    def __next__(self) -> Row:
        import datasets.exceptions
        import pyarrow as pa
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its client

        try:
            row = next(self._rows)
        except (ConnectionError, TimeoutError, HTTPError) as error:
            raise NetworkError(
                f"The Hub stopped answering after {self._taken} records of {self._name!r}. What is "
                "done is kept; run the same command again to go on."
            ) from error
        except (pa.ArrowException, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise InputError(
                f"Dataset {self._name!r} cannot be read after {self._taken} records ({error}). "
                "Download its files and pass them with --dataset: there, malformed lines are "
                "counted and left out."
            ) from error
        self._taken += 1
        return Row(row)


def _commit(dataset: str, revision: str | None) -> str | None:
    """The commit hash of a branch, a tag or None; asking once also finds out what is wrong."""
    import huggingface_hub.errors as hub_errors
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its client

    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=20).sha
    except hub_errors.GatedRepoError as error:
        raise InputError(
            f"Dataset {dataset} is gated. Accept its terms at "
            f"https://huggingface.co/datasets/{dataset}, run `hf auth login`, and try again."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(
            f"Dataset {dataset} has no revision {revision!r} on the Hub. Pass a branch, a tag or a "
            f"commit listed at https://huggingface.co/datasets/{dataset}/commits/main."
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise unknown_dataset(dataset) from error
    except (HTTPError, OSError) as error:
        raise _no_network(dataset) from error


def is_hub_id(dataset: str) -> bool:
    """Whether a name is spelt like name, owner/name or owner/name:subset."""
    return _HUB_ID.fullmatch(dataset) is not None


def unknown_dataset(dataset: str) -> InputError:
    return InputError(
        f"Dataset {dataset!r} was not found: it is neither local text nor on the Hub (or it is "
        "private, and `hf auth login` is needed). Check the spelling."
    )


def _no_network(dataset: str) -> NetworkError:
    return NetworkError(
        f"Dataset {dataset} could not be reached on the Hub: no network, or the Hub does not "
        f"answer. {_LOCAL_HINT}"
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Our sentences say it; the library's log lines and bars would say it a second time."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
